"""Accelerated models on a device."""

from typing import Any

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf

from ..ops.cases import BF16, F32
from ..patch import models
from ..tolerances import assert_within_budget
from .targets import Target
from .test_block_ops import HOST, ON_GPU, with_both_modes

ON_EVERY = [(HOST, ("hunyuan",)), *((target, models.TINY) for target in ON_GPU)]
on_every_model = pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target.values[0], name, marks=target.marks, id=f"{name}-{target.id}")
        for target, names in ON_EVERY
        for name in names
    ],
)


class TestModels:
    """Accelerated transformers of every family, small ones."""

    def inputs(self, name: str, dtype: torch.dtype, target: Target, batch: int = 2, seed: int = 1) -> dict[str, Any]:
        torch.manual_seed(seed)
        drawn = models.TINY[name].draw(dtype, batch)
        return {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in drawn.items()}

    @on_every_model
    @with_both_modes
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_within_the_budget_of_eager(self, target: Target, name: str, dtype: torch.dtype, mode: str) -> None:
        model = models.TINY[name].model(dtype).to(target.device)
        wide = models.TINY[name].model(dtype).double().to(target.device)
        # Several draws, as one may be right by luck in plain torch.
        given = [self.inputs(name, dtype, target, seed=seed) for seed in range(3)]
        runs = [(model, each) for each in given] + [(wide, models.doubled(each)) for each in given]
        plain = [models.run(*run) for run in runs]
        dgf.accelerate(model, mode, recompute="all", backend=target.backend)
        found = [models.run(model, each) for each in given]
        parts = (found, plain[3:], plain[:3])
        assert_within_budget(*(torch.stack([output for output, _ in part]) for part in parts))
        models.assert_gradients_within_budget(*(part[0][1] for part in parts))

    @on_every_model
    @with_both_modes
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_ratio_is_exactly_one_on_policy(self, target: Target, name: str, dtype: torch.dtype, mode: str) -> None:
        """Rollout without gradients, replay with them, recomputation and checkpoints."""
        model = models.TINY[name].model(dtype).to(target.device)
        dgf.accelerate(model, mode, recompute="all", backend=target.backend)
        inputs = self.inputs(name, dtype, target, batch=4)
        table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(4, 3.0), 0.5)

        def output() -> Tensor:
            return model(**inputs, return_dict=False)[0].reshape(4, -1)

        with torch.no_grad():
            velocity = output()
            latents = torch.randn(velocity.shape, device=target.device)
            step = dgf.transition_step(latents, velocity, table, 1, seed=3)
        model.enable_gradient_checkpointing()
        advantages = torch.tensor([1.0, -1.0, 0.5, 2.0], device=target.device)
        loss = dgf.policy_loss(latents, output(), step.latents, table, 1, step.log_prob, advantages)
        loss.loss.backward()
        assert torch.equal(loss.ratio, torch.ones_like(loss.ratio))
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
