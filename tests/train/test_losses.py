"""An objective that is not GRPO's goes through the same updates: samples noised anew, a mean error, no ratio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops.noise import gaussian_noise
from dancegrpo_fast.train import Trainer
from dancegrpo_fast.train.calls import Item
from dancegrpo_fast.train.collect import Batch
from dancegrpo_fast.train.losses import Term

from ..tolerances import REORDERED_SUMS
from .tiny import make_recipe

DRAWS = 2


class Matching:
    """Flow matching weighted by advantages."""

    keeps_outputs = False
    pairs_per_sample = DRAWS
    metrics = ("matching_error",)

    def noised(self, batch: Batch, samples: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, times and targets."""
        clean = batch.trajectory.final[samples]
        noise = gaussian_noise(clean.shape[1:], seed=3, sample_ids=samples * DRAWS + draws)
        time = (draws + 1.0) / (DRAWS + 1)
        wide = time.reshape(-1, *(1,) * (clean.ndim - 1))
        return (1 - wide) * clean + wide * noise, time, noise - clean

    def pairs(self, batch: Batch, samples: Sequence[int]) -> list[Item]:
        return [Item((sample,), draw, sample % 4) for draw in range(DRAWS) for sample in samples]

    def inputs(self, batch: Batch, samples: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        return self.noised(batch, samples, steps)[:2]

    def others(self, *_: Any) -> dict[str, Tensor]:
        return {}

    def term(self, batch: Batch, samples: Tensor, steps: Tensor, outputs: Any, weight: float, scale: float) -> Term:
        error = ((outputs["model_output"] - self.noised(batch, samples, steps)[2]) ** 2).flatten(1).mean(1)
        loss = weight * (batch.own_advantages[samples] * error).mean()
        count = torch.tensor(float(len(samples)))
        return Term(loss, count, {"matching_error": error.detach().mean()}, None, torch.ones(len(samples)).bool())


@pytest.mark.parametrize("equal", [True, False], ids=["dense", "rows"])
def test_another_objective(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool) -> None:
    monkeypatch.setattr("dancegrpo_fast.train.setup.make_loss", lambda *_: Matching())
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: equal)
    # Six samples are kept, twelve pairs in calls of four.
    trainer = Trainer(make_recipe(flux, tmp_path / "run", best_of_n=1, max_grad_norm=1e9))
    batch, parameters = trainer.collect(1, trainer.prompts), list(trainer.parameters.values())
    index, draws = torch.cartesian_prod(torch.arange(6), torch.arange(DRAWS)).T
    latents, times, target = Matching().noised(batch, index, draws)
    text = {name: value[torch.tensor(batch.prompts)[index]] for name, value in batch.conditioning.items()}
    output, _ = trainer.model.predict(trainer.denoiser, latents, times, text, None, 1.0)
    error = ((output - target) ** 2).flatten(1).mean(1)
    wanted = torch.autograd.grad((batch.own_advantages[index] * error).mean(), parameters)

    found: list[Tensor] = []
    trainer.optimizer.torch.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in parameters))
    monkeypatch.setattr(trainer, "collect", lambda *_: batch)
    row = trainer.iteration(1)
    ours, theirs = (torch.cat([grad.flatten() for grad in grads]) for grads in (found, wanted))
    assert torch.linalg.norm(ours - theirs) < REORDERED_SUMS * torch.linalg.norm(theirs)
    assert row["pairs"] == 6 * DRAWS and "ratio_max_dev" not in row
    assert row["matching_error"] == pytest.approx(float(error.detach().mean()), rel=REORDERED_SUMS)
    assert row["skipped"]["model_rows"] - row["skipped"]["padded_rows"] == 6 * DRAWS
