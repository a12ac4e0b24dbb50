"""How pairs of (sample, step) are dealt to model calls, and what the replay's loss adds up to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.train.draw import Policy, rows_are_equal
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.train.update import Item, fill, pack

from .tiny import make_recipe

POLICY: Any = Policy(model=None, rows=4, guidance_scale=1.0, unconditional=None)  # type: ignore[arg-type]  # not called


@pytest.mark.parametrize("equal", [True, False])
def test_every_item_is_dealt_once(equal: bool) -> None:
    items = [(sample % 4, Item((sample,), step)) for sample in (0, 1, 4, 5, 6, 9, 13) for step in (2, 7)]
    calls = list(pack(items, replace(POLICY, rows_are_equal=equal)))
    assert sorted(item for call in calls for item in call.values()) == sorted(item for _, item in items)
    assert all(set(call) <= set(range(4)) for call in calls)
    if equal:
        assert [len(call) for call in calls] == [4, 4, 4, 2]
    else:
        assert all(item.samples[0] % 4 == row for call in calls for row, item in call.items())


def test_empty_rows_repeat_another() -> None:
    b, d = Item((1,), 0), Item((3,), 0)
    assert fill({1: b, 3: d}, 4) == [b, b, b, d]
    assert list(pack([], POLICY)) == []


class RowSensitive:
    """A model whose last row differs in the last bit."""

    latent_shape = (3,)
    denoiser = torch.nn.Identity()

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def predict(self, denoiser: Any, latents: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, None]:
        output = latents.clone()
        output[-1] += self.amount
        return output, None


@pytest.mark.parametrize(("amount", "equal"), [(0.0, True), (1e-6, False)])
def test_the_probe_sees_a_row_that_differs(flux: Path, tmp_path: Path, amount: float, equal: bool) -> None:
    table = Trainer(make_recipe(flux, tmp_path / "run")).table
    policy = replace(POLICY, model=RowSensitive(amount))
    assert rows_are_equal(policy, table, {"embeds": torch.zeros(2, 1)}) is equal


@pytest.mark.parametrize("equal", [True, False])
def test_the_update_does_not_depend_on_the_packing(
    flux: Path, tmp_path: Path, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dancegrpo_fast.train.loop.rows_are_equal", lambda *_: equal)
    row = Trainer(make_recipe(flux, tmp_path / "run", best_of_n=1, micro_batch=4)).iteration(1)
    monkeypatch.setattr("dancegrpo_fast.train.loop.rows_are_equal", lambda *_: True)
    dense = Trainer(make_recipe(flux, tmp_path / "dense", best_of_n=1, micro_batch=4)).iteration(1)
    assert row["pairs"] == dense["pairs"]
    assert row["grad_norm"] == pytest.approx(dense["grad_norm"], rel=torch.finfo(torch.float32).eps ** 0.5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("equal", [True, False], ids=["dense", "rows"])
def test_gradient_is_that_of_the_formula(
    flux: Path, tmp_path: Path, equal: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples in one update: the gradient equals autograd through the plain formula, one pair at a time."""
    from dancegrpo_fast.train import loop as module

    monkeypatch.setattr(module, "rows_are_equal", lambda *_: equal)
    trainer = Trainer(make_recipe(flux, tmp_path / "run", shared_noise=shared, timestep_fraction=1.0))
    seen: dict[str, Any] = {}
    original = module.backward_update

    def keep(policy: Any, denoiser: Any, table: Any, data: Any, *rest: Any, **settings: Any) -> bool:
        changed = original(policy, denoiser, table, data, *rest, **settings)
        seen.update(data=data, grads=[p.grad.clone() for p in denoiser.parameters()])
        return changed

    module.backward_update = keep
    before = {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters()}
    try:
        trainer.iteration(1)
    finally:
        module.backward_update = original
    trainer.denoiser.load_state_dict(before)
    data, table = seen["data"], trainer.table
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for sample in range(len(data.steps)):
        for step in data.steps[sample]:
            x, target = data.trajectory.latents[sample, step], data.trajectory.latents[sample, step + 1]
            embeds = {name: value[data.prompts_host[sample]][None] for name, value in data.conditioning.items()}
            time = table.times[step].float()[None]
            output = trainer.model.predict(trainer.denoiser, x[None], time, embeds, None, 1.0)[0][0].double()
            a, b, tau = (float(column[step]) for column in (table.a, table.b, table.tau))
            score = -((target.double() - a * x.double() - b * output) ** 2).mean() / (2 * tau**2)
            ratio = torch.exp(score - score.detach())
            total = total - float(data.advantages[sample]) * ratio
            count += 1
    grads = torch.autograd.grad(total / count, list(trainer.denoiser.parameters()))
    expected = torch.cat([g.flatten() for g in grads])
    actual = torch.cat([g.flatten() for g in seen["grads"]])
    assert torch.linalg.norm(actual - expected) < torch.finfo(torch.float32).eps ** 0.5 * torch.linalg.norm(expected)
