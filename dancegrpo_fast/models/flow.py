"""Schedules and samplers of the rectified-flow families."""

from typing import Any

import numpy as np
from torch import Tensor

from .. import transitions
from ..recipe import SamplerSettings


def flow_sigmas(sampler: SamplerSettings, scheduler: Any, mu: float | None = None, linear: bool = True) -> Tensor:
    """Sigmas `[T + 1]` from at most 1 to 0.

    Args:
        sampler: its `shift` is the static shift of the published GRPO recipes; None takes the pipeline's schedule.
        scheduler: the pipeline's `FlowMatchEulerDiscreteScheduler`.
        mu: of schedulers whose shift depends on the image's size.
        linear: the pipeline passes sigmas from 1 to 1 / T; otherwise the scheduler spaces them.
    """
    steps = sampler.num_steps
    if sampler.shift is not None:
        return transitions.shifted_sigmas(steps, sampler.shift)
    if linear:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    sigmas: Tensor = scheduler.sigmas
    # The shift in float32 may round 1 to the number above it.
    return sigmas.double().clamp(max=1.0)


def shift_for(scheduler: Any, tokens: int) -> float:
    """The `mu` of a scheduler whose shift depends on how many tokens an image has, as diffusers' pipelines have it.

    Their modules are not asked: importing one loads image processors that nothing here uses.
    """
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu: float = tokens * slope + (config.base_shift - slope * config.base_image_seq_len)
    return mu


def flow_table(sampler: SamplerSettings, sigmas: Tensor, deterministic: bool) -> transitions.TransitionTable:
    """The table that the settings ask for over `sigmas` `[T + 1]`; `deterministic` gives the ODE."""
    euler = transitions.ode(sigmas)
    if deterministic or sampler.kind == "ode":
        return euler
    builders = {"dance_sde": transitions.dance_sde, "flow_sde": transitions.flow_sde, "cps": transitions.cps}
    if sampler.kind not in builders:
        raise ValueError(f'sampler.kind: got "{sampler.kind}", want one of {[*builders, "ode"]} for a flow model')
    table = builders[sampler.kind](sigmas, sampler.eta)
    return table if sampler.window is None else transitions.mixed(table, euler, sampler.window)
