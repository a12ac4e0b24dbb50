"""verl-omni's rollout step of packed requests, whose samples have noise levels of their own."""

from typing import Any

import torch
from torch import Tensor

from .. import transitions
from ..compat._common import cached, noise_like, unnormalized
from ..kernels.transition import reference
from ..transitions import TransitionTable
from ._rows import transition

_KINDS = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance_sde"}


def is_packed(
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    noise_level: Tensor,
    timestep: Any,
    prev_sample: Any,
    sde_type: str,
    **others: Any,
) -> bool:
    """A rollout step of packed requests: at the scheduler's own index, a noise level for each sample."""
    rollout = timestep is None and prev_sample is None and self.step_index is not None
    floats = sample.dtype == model_output.dtype == torch.float32
    return rollout and floats and noise_level.numel() == len(sample) and sde_type in _KINDS


def by_sample(
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    noise_level: Tensor,
    sde_type: str,
    generator: Any,
    return_logprobs: bool,
    return_sqrt_dt: bool,
    include_logprob_normalizer: bool,
    **others: Any,
) -> tuple[Tensor | None, ...]:
    """What `sample_previous_step` returns, each sample with its own noise level."""
    # Read back, and as it was written: the replay has 0.7, and not the float32 number next to it.
    levels = [float(str(level)) for level in noise_level.flatten().float().cpu().numpy()]
    tables = [_table(self.sigmas, _KINDS[sde_type], level, include_logprob_normalizer) for level in levels]
    packed, wide = (
        torch.stack([table.packed(sample.device, dtype)[self.step_index] for table in tables])
        for dtype in (torch.float32, torch.float64)
    )
    noise = noise_like(model_output, generator, torch.float32)
    after, log_prob, mean = transition(sample, model_output, packed, None, noise)
    tau, sqrt_dt = wide[:, reference.TAU], wide[:, reference.STEP_SIZE].sqrt()
    std = (tau / sqrt_dt if sde_type == "sde" else tau).float().reshape(-1, *(1,) * (sample.ndim - 1))
    found = (after, log_prob if return_logprobs else None, mean, std)
    return (*found, sqrt_dt.float()) if return_sqrt_dt else found


def _table(sigmas: Tensor, kind: str, level: float, normalized: bool) -> TransitionTable:
    def build(values: Tensor) -> Any:
        found: TransitionTable = getattr(transitions, kind)(values, level)
        return found if normalized else unnormalized(found)

    found: TransitionTable = cached("sigmas", sigmas, ("plug-in", kind, level, normalized), build)
    return found
