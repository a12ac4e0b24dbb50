"""Work that is saved while samples are drawn: it changes no bit of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dancegrpo_fast.ops.noise import gaussian_noise
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.calls import Policy, model_calls
from dancegrpo_fast.train.collect import Collector
from dancegrpo_fast.train.draw import Draw
from dancegrpo_fast.train.held_out import Evaluator
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.train.residence import Residence

from ..tolerances import assert_independent
from .tiny import EvaluationSettings, make_recipe, reward


@pytest.mark.parametrize("equal", [True, False], ids=["dense", "rows"])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_best_of_n_keeps_what_it_trains_on(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, equal: bool
) -> None:
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: equal)
    drawn: list[int] = []
    original, found = Draw.samples, []

    def counted(draw: Draw, start: Any, prompts: Any, ids: torch.Tensor, recorder: Any) -> Any:
        drawn.append(len(ids))
        return original(draw, start, prompts, ids, recorder)

    monkeypatch.setattr(Draw, "samples", counted)
    for name in ("sets", "whole"):
        if name == "whole":
            monkeypatch.setattr(Collector, "_parts", lambda collector: [collector._mine])
        trainer = Trainer(make_recipe(flux, tmp_path / name, best_of_n=1, micro_batch=micro_batch))
        rows = [{k: v for k, v in trainer.iteration(i).items() if k not in ("seconds", "speed")} for i in (1, 2)]
        found.append((rows, [p.detach() for p in trainer.parameters.values()]))
    # A group of four is one set; three prompts, two iterations.
    assert drawn == [4] * 6 + [12] * 2
    (sets, ours), (whole, theirs) = found
    assert sets == whole
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("window", [[1], [2], None], ids=str)
def test_steps_before_the_first_noise_are_made_once(base: Path, tmp_path: Path, window: list[int] | None) -> None:
    trainer = Trainer(make_recipe(base, tmp_path / "run", micro_batch=1, window=window, timestep_fraction=1.0))
    calls = [0]

    class Counted(Policy):
        def __call__(self, *arguments: Any) -> Any:
            calls[0] += 1
            return super().__call__(*arguments)

    policy = Counted(**vars(trainer.policy))
    ids = torch.arange(6)
    noise = gaussian_noise(trainer.model.latent_shape, seed=1, sample_ids=ids[:2])
    embeds = trainer.model.encode(trainer.prompts[:2])
    draw = Draw(policy, trainer.table, embeds, seed=2, keep_outputs=True)
    # Where the first stochastic step is k, four of six samples need no call of their own up to it.
    first = 0 if window is None else window[0]
    shared = draw.samples(draw.start(noise, first), ids // 3, ids)
    made = calls[0]
    alone = draw.samples(noise.repeat_interleave(3, dim=0), ids // 3, ids)
    assert made == model_calls(1, 4, 2, 6, shared=first + 1) == 6 * 4 - 4 * (first + 1)
    assert calls[0] - made == model_calls(1, 4, 2, 6) == 6 * 4
    for ours, theirs in zip(vars(shared).values(), vars(alone).values(), strict=True):
        # Of a family that decodes its last latents there is no x0.
        assert torch.equal(ours, theirs) if ours is not None else theirs is None
    assert bool((shared.latents[0, first + 1] != shared.latents[1, first + 1]).any())


def test_a_window_is_replayed_in_the_row_it_was_drawn_in(base: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(base, tmp_path / "run", window=[1, 2], timestep_fraction=1.0, micro_batch=3))
    row = trainer.iteration(1)
    assert row["ratio_first_update_max_dev"] == 0.0
    # Step 1 of the four samples of each of three prompts is one row.
    assert row["skipped"]["shared_rows_saved"] == 9
    assert row["pairs"] == 24


def test_the_average_is_evaluated_and_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decay = 0.75
    settings = EvaluationSettings(every=1, samples_per_prompt=2, grid_samples=1, rewards=[reward("Brightness")])
    trainer = Trainer(
        make_recipe(
            base, tmp_path / "run", ema_decay=decay, evaluation=settings, keep_checkpoints=3, prompts_per_iteration=1
        )
    )
    expected = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    evaluated: list[dict[str, torch.Tensor]] = []
    evaluate = Evaluator.__call__

    def watched(evaluator: Evaluator, sampler: str) -> Any:
        evaluated.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
        return evaluate(evaluator, sampler)

    monkeypatch.setattr(Evaluator, "__call__", watched)
    trainer.run()
    folders = checkpoint.complete(tmp_path / "run" / "checkpoints")
    assert len(folders) == 2 and len(evaluated) == 6
    for number, folder in enumerate(folders, start=1):
        tensors = checkpoint.load(folder)[0]
        for name, value in tensors["model"].items():
            expected[name] = expected[name].lerp(value, 1 - decay)
            assert torch.equal(tensors["ema"][name], expected[name])
            assert torch.equal(evaluated[2 * number][name], expected[name])
    assert all(torch.equal(p, tensors["model"][name]) for name, p in trainer.parameters.items())
    part = "transformer" if (base / "transformer").is_dir() else "unet"
    assert (tmp_path / "run" / "model_ema" / part / "config.json").is_file()


def test_no_noise_comes_twice(flux: Path, tmp_path: Path) -> None:
    """In no other sample, step or iteration, be it the first latents' or a step's."""
    trainer = Trainer(make_recipe(flux, tmp_path / "run", shared_noise=False, ratio_norm=True))
    draws, table = [], trainer.table
    for iteration in (1, 2):
        drawn = trainer.collect(iteration, trainer.prompts).trajectory
        assert drawn.outputs is not None
        draws.append(drawn.latents[:, 0])
        for step in trainer.loss.trainable_steps:
            a, b, tau = (float(column[step]) for column in (table.a, table.b, table.tau))
            draws.append((drawn.latents[:, step + 1] - a * drawn.latents[:, step] - b * drawn.outputs[:, step]) / tau)
    assert_independent(torch.cat(draws).flatten(1))


@pytest.mark.parametrize("judged", [False, True])
def test_one_model_at_a_time(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: bool) -> None:
    judges = EvaluationSettings(every=1, samples_per_prompt=2, rewards=[reward("Brightness")], grid_samples=1)
    changes: dict[str, Any] = {"rewards": [reward("Carried")], "evaluation": judges if judged else None}
    plain = Trainer(make_recipe(flux, tmp_path / "plain", **changes))
    plain.run()
    trainer = Trainer(make_recipe(flux, tmp_path / "run", offload=["denoiser", "vae", "rewards"], **changes))
    where = {"denoiser": "meta", "vae": "cpu", "rewards": "cpu"}
    ran: list[str] = []
    model: Any = trainer.model

    def watch(name: str, part: Any, owner: Any, method: str) -> None:
        original = getattr(owner, method)

        def runs(*arguments: Any, **keywords: Any) -> Any:
            ran.append(name)
            assert where == dict.fromkeys(where, "cpu") | {name: "meta"}
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, method, runs)
        monkeypatch.setattr(part, "to", lambda device: where.update({name: str(device)}), raising=False)

    scored = trainer.rewards._rewards[0]
    watch("denoiser", model.denoiser, model.denoiser, "forward")
    watch("vae", model.vae, model.vae, "decode")
    watch("rewards", scored, type(scored), "__call__")
    monkeypatch.setattr(trainer.residence, "_device", torch.device("meta"))
    trainer.run()
    assert set(ran) == set(where) and where["denoiser"] == "meta"
    for name, parameter in model.denoiser.named_parameters():
        assert torch.equal(parameter, plain.model.denoiser.get_parameter(name))


def test_a_set_of_rewards_comes_alone() -> None:
    class Part:
        device = ""

        def to(self, device: Any) -> None:
            self.device = str(device)

    model, rewards, judges = Part(), Part(), Part()
    residence = Residence(["rewards"], cast(Any, model), torch.device("meta"))
    for one in (rewards, judges):
        residence.add(cast(Any, one))
    residence.use(cast(Any, judges))
    assert (model.device, rewards.device, judges.device) == ("", "cpu", "meta")
    residence.use("denoiser")
    assert (model.device, rewards.device, judges.device) == ("", "cpu", "cpu")
    with pytest.raises(ValueError, match=r'train\.offload: got "vae" for Part, which has no decoder'):
        Residence(["vae"], cast(Any, model), torch.device("cpu"))


def test_a_micro_batch_fits_the_samples(flux: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run"))
    trainer.processes.groups = 4
    with pytest.raises(ValueError, match=r"micro_batch: got 4, want at most the 3 samples of each of 4 processes"):
        replace(trainer.collect)


@pytest.mark.parametrize("updates", [1, 2, 5])
@pytest.mark.parametrize("equal", [True, False])
def test_updates_share_out_the_samples(flux: Path, tmp_path: Path, updates: int, equal: bool) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run", updates_per_rollout=updates))
    hands = replace(trainer.updates, rows_are_equal=equal)._deal(range(12), 1, 0)
    assert sorted(sample for hand in hands for sample in hand) == list(range(12))
    assert all(hand == sorted(hand) for hand in hands)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    if equal and updates > 1:
        # Any process, whichever neighbours it has, is asked for an even share.
        for hand in hands:
            inside = [sample for sample in hand if sample < 6]
            assert abs(len(inside) - 6 / updates) < 1
