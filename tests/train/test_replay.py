"""How pairs of (sample, step) are dealt to model calls, and what the replay's loss adds up to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.train.calls import Item, Policy, pack, plan_calls, rows_are_equal
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.transitions import TransitionTable

from .tiny import make_recipe

POLICY: Any = Policy(model=None, rows=4, guidance_scale=1.0, unconditional=None)  # type: ignore[arg-type]  # not called


@pytest.mark.parametrize("equal", [True, False])
def test_every_item_is_dealt_once(equal: bool) -> None:
    items = [Item((sample,), step, sample % 4) for sample in (0, 1, 4, 5, 6, 9, 13) for step in (2, 7)]
    calls = list(pack(items, 4, equal=equal))
    assert sorted(item for call in calls for item in call.values()) == sorted(items)
    assert all(set(call) <= set(range(4)) for call in calls)
    if equal:
        assert [len(call) for call in calls] == [4, 4, 4, 2]
    else:
        assert all(item.row == row for call in calls for row, item in call.items())


@pytest.mark.parametrize("equal", [True, False])
def test_a_call_is_for_one_denoiser(equal: bool) -> None:
    items = [Item((sample,), step, sample % 2, step // 4) for sample in range(3) for step in (2, 7)]
    calls = list(pack(items, 2, equal=equal))
    assert [{item.expert for item in call.values()} for call in calls] == [{0}, {0}, {1}, {1}]
    assert sorted(item for call in calls for item in call.values()) == sorted(items)
    planned = plan_calls(calls, 2, prompts=[0, 0, 0], weight=1.0, device=torch.device("cpu"))
    assert [call.expert for call in planned] == [0, 0, 1, 1]


def test_empty_rows_repeat_another() -> None:
    places = {1: Item((1,), 7, 1), 3: Item((2, 3), 8, 3)}
    (call,) = plan_calls([places], 4, prompts=[4, 5, 6, 6], weight=0.5, device=torch.device("cpu"))
    assert call.rows.tolist() == [[1, 1, 1, 2], [7, 7, 7, 8], [5, 5, 5, 6]]
    assert (call.used, call.single.tolist(), call.weight) == (2, [1], 0.5)
    assert [(row, step, samples.tolist()) for row, step, samples in call.shared] == [(3, 8, [2, 3])]
    assert list(pack([], 4, equal=False)) == []


class RowSensitive:
    """A model whose last row differs in the last bit."""

    latent_shape = (3,)
    denoiser = torch.nn.Identity()
    compiled = None

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def turns(self, table: TransitionTable) -> list[int]:
        return [0] * len(table)

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
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: equal)
    row = Trainer(make_recipe(flux, tmp_path / "run", best_of_n=1, micro_batch=4)).iteration(1)
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: True)
    dense = Trainer(make_recipe(flux, tmp_path / "dense", best_of_n=1, micro_batch=4)).iteration(1)
    assert row["pairs"] == dense["pairs"]
    assert row["grad_norm"] == pytest.approx(dense["grad_norm"], rel=torch.finfo(torch.float32).eps ** 0.5)
