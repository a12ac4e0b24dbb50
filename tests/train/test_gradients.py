"""The gradient of every optimiser update is that of the objective, written anew in float64 on what was sampled."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dancegrpo_fast.train import Trainer

from ..tolerances import DRAW, REORDERED_SUMS, assert_same_gradient, assert_within_budget
from .tiny import LoraSettings, make_recipe, reward

TWO = [
    reward("Brightness", weight=0.3),
    reward("Brightness", weight=2.0, label="blue", args={"channel": 2}),
]
KL: dict[str, Any] = {"kl_weight": 0.05, "updates_per_rollout": 3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every sample in its row": {"rows_are_equal": False},
    "noise of each sample's own": {"shared_noise": False},
    "kl": KL,
    "kl of adapters": KL | {"lora": LoraSettings(rank=2, alpha=4), "learning_rate": 0.1},
    "ratio norm": {"ratio_norm": True},
    "flow sde": {"kind": "flow_sde"},
    "cps": {"kind": "cps", "eta": 0.7},
    "window": {"window": [1, 2]},
    # Six samples that are kept in four updates.
    "best of n": {"best_of_n": 1, "updates_per_rollout": 4},
    "two rewards": {"rewards": TWO},
    # Which samples are the best is not known before the last group is scored.
    "batch": {"rewards": TWO, "advantages": "batch", "advantage_clip": 0.9, "best_of_n": 1},
    "floor": {"rewards": TWO, "advantage_std_floor": 0.008, "advantage_clip": 0.7},
    "mean only": {"divide_by_std": False},
    "inner epochs": {"inner_epochs": 2},
    "ddim": {"guidance_scale": 4.0},
}


@dataclass
class Seen:
    """An iteration's row and samples, and of each update its samples, the model before it, the gradient."""

    row: Any = None
    batch: Any = None
    samples: list[Sequence[int]] = field(default_factory=list)
    models: list[nn.Module] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def watched(trainer: Trainer) -> Seen:
    """Trains for one iteration."""
    seen, collect, deal = Seen(), trainer.collect, trainer.updates._deal

    def keep_batch(*arguments: Any) -> Any:
        seen.batch = collect(*arguments)
        return seen.batch

    def keep_samples(*arguments: Any) -> Any:
        hands = deal(*arguments)
        seen.samples += hands
        return hands

    def keep_update(*_: Any) -> None:
        seen.models.append(copy.deepcopy(trainer.model.denoiser))
        seen.gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values()]))

    trainer.collect, trainer.updates._deal = keep_batch, keep_samples  # type: ignore[assignment]  # as they are called
    trainer.optimizer.torch.register_step_pre_hook(keep_update)
    seen.row = trainer.iteration(1)
    return seen


def advantages_of(trainer: Trainer, rewards: Tensor) -> Tensor:
    """`[B]`: of each reward within its group, limited, and then their weighted sum."""
    train = trainer.recipe.train
    groups = rewards.double().reshape(len(rewards), -1, train.group_size)
    std = groups.std(-1, keepdim=True)
    if train.advantages == "batch":
        std = rewards.double().std(-1)[:, None, None].expand_as(std)
    if not train.divide_by_std:
        std = torch.ones_like(std)
    std = std.maximum(torch.tensor(train.advantage_std_floor))
    apart = (groups - groups.mean(-1, keepdim=True)) / (std + 1e-8)
    apart = torch.minimum(apart, torch.tensor(train.advantage_clip)).maximum(torch.tensor(-train.advantage_clip))
    weights = torch.tensor([one.weight for one in trainer.recipe.rewards], dtype=torch.float64)
    return torch.einsum("k,kpg->pg", weights, apart).flatten()


@dataclass
class Wanted:
    """The objective's gradient, which pairs of sample and step are clipped, their steps, and how far they moved."""

    gradient: Tensor
    clipped: list[bool]
    steps: Tensor
    moved: Tensor


def gradient_of(trainer: Trainer, seen: Seen, update: int, dtype: torch.dtype) -> Wanted:
    """Of an update in `dtype`, of all pairs at once."""
    recipe, table, data = trainer.recipe, trainer.table, seen.batch
    kept = [data.kept.index(sample) for sample in seen.samples[update]]
    # In the first iteration a sample's place is its number.
    index, step = torch.tensor([(row, step) for row in kept for step in trainer.loss.steps(data.kept[row])]).T
    latents = data.trajectory.latents.to(dtype)
    x, then = latents[index, step], latents[index, step + 1]
    a, b, tau = (values[step].to(dtype).reshape(-1, *(1,) * (x.ndim - 1)) for values in (table.a, table.b, table.tau))
    scale = recipe.sampler.guidance_scale
    text = {name: value[torch.tensor(data.prompts)[index]].to(dtype) for name, value in data.conditioning.items()}
    empty = trainer.model.unconditional(scale)
    empty = None if empty is None else {name: value.to(dtype) for name, value in empty.items()}

    def velocity(model: nn.Module) -> Tensor:
        made, without = trainer.model.predict(
            nn.Module.to(model, dtype), x, table.times[step].to(dtype), text, empty, scale
        )
        return made if without is None else without + scale * (made - without)

    def mean(values: Tensor) -> Tensor:
        return values.flatten(1).mean(1)

    model = copy.deepcopy(seen.models[update])
    with torch.no_grad():
        # Nothing was trained before the first update: the rollout's model is the reference, too.
        old = velocity(copy.deepcopy(seen.models[0]))
    new, spread = velocity(model), tau.flatten()
    log_ratio = mean((then - a * x - b * old) ** 2) - mean((then - a * x - b * new) ** 2)
    if recipe.sampler.kind != "cps":
        log_ratio = log_ratio / (2 * spread**2)
    weight, moved = torch.ones_like(log_ratio), log_ratio.detach().abs()
    if recipe.train.ratio_norm:
        log_ratio = (log_ratio + mean((b * (new - old)) ** 2) / (2 * spread**2)) * spread
        weight = 1 / (table.times[step] - table.times[step + 1]).to(dtype)
    ratio, clip = log_ratio.exp(), 2e-6 if recipe.train.ratio_norm else 1e-4
    advantage = advantages_of(trainer, data.rewards)[[data.kept[row] for row in index]].to(dtype)
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    loss = (weight * torch.maximum(free, bounded)).mean()
    loss = loss + recipe.train.kl_weight * mean((b * (new - old)) ** 2 / (2 * tau**2)).mean()
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return Wanted(torch.cat([grad.flatten() for grad in grads]), (bounded > free).tolist(), step, moved)


def by_step(wanted: Sequence[Wanted], steps: Sequence[int]) -> Tensor:
    """`[2, steps]`: the mean and the largest of how far the log-probabilities of a step's pairs moved."""
    step, moved = (torch.cat(values) for values in zip(*((one.steps, one.moved) for one in wanted), strict=True))
    apart = [moved[step == here] for here in steps]
    return torch.stack([torch.stack([one.mean() for one in apart]), torch.stack([one.max() for one in apart])])


@pytest.mark.parametrize("name", CASES)
def test_every_update(flux: Path, diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes = {"updates_per_rollout": 2, "timestep_fraction": 1.0, "max_grad_norm": 1e9} | CASES[name]
    equal = changes.pop("rows_are_equal", True)
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: equal)
    trainer = Trainer(make_recipe(diffusion if name == "ddim" else flux, tmp_path / "run", **changes))
    seen = watched(trainer)
    updates = changes["updates_per_rollout"] * changes.get("inner_epochs", 1)
    assert len(seen.gradients) == len(seen.samples) == updates
    every: list[tuple[Wanted, Wanted]] = []
    for update, actual in enumerate(seen.gradients):
        monkeypatch.setattr(trainer.model, "dtype", torch.float64)
        truth = gradient_of(trainer, seen, update, torch.float64)
        monkeypatch.setattr(trainer.model, "dtype", torch.float32)
        plain = gradient_of(trainer, seen, update, torch.float32)
        assert_same_gradient(actual, truth.gradient, plain.gradient)
        every.append((truth, plain))
    # On policy nothing is clipped, later about half is.
    counted = [one for truth, _ in every for one in truth.clipped]
    assert True in counted and False in counted
    told, trained = seen.row["log_prob_change"], trainer.loss.trainable_steps
    assert {t for t, mean in enumerate(told["mean"]) if mean is not None} == set(trained)
    found = torch.tensor([[told[kind][t] for t in trained] for kind in ("mean", "max")])
    truth, plain = (by_step(one, trained) for one in zip(*every, strict=True))
    assert_within_budget(found, truth, plain, source=DRAW * float((plain.double() - truth).abs().max()))


def test_long_gradients_are_made_shorter(flux: Path, tmp_path: Path) -> None:
    """To `max_grad_norm`, and the row tells how long they were; shorter ones stay as they are."""
    free = watched(Trainer(make_recipe(flux, tmp_path / "free", max_grad_norm=1e9)))
    (wanted,) = free.gradients
    length = float(wanted.norm())
    for name, largest in (("bound", length / 3), ("loose", length * 3)):
        seen = watched(Trainer(make_recipe(flux, tmp_path / name, max_grad_norm=largest)))
        assert seen.row["grad_norm"] == free.row["grad_norm"] == pytest.approx(length, rel=REORDERED_SUMS)
        apart = float((seen.gradients[0] / min(1.0, largest / length) - wanted).norm())
        assert apart < REORDERED_SUMS * length
