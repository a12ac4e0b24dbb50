"""Tables of diffusers' schedulers, which are read and never imported."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checks import check_level, shown
from .diffusion import ddim, vp_sde
from .flow import cps, dance_sde, flow_sde, ode
from .table import TransitionTable, mixed

_Builders = dict[str, Callable[[float], TransitionTable]]


def _flow_builders(scheduler: Any) -> _Builders:
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError("scheduler: got stochastic_sampling=True, want it off and a sampler of this package")
    sigmas = scheduler.sigmas.to("cpu", torch.float64)
    return {
        "ode": lambda level: ode(sigmas),
        "dance_sde": lambda level: dance_sde(sigmas, level),
        "flow_sde": lambda level: flow_sde(sigmas, level),
        "cps": lambda level: cps(sigmas, level),
    }


def _diffusion_builders(scheduler: Any) -> _Builders:
    config = scheduler.config
    for name in ("clip_sample", "thresholding"):
        if config.get(name):
            raise ValueError(f"scheduler: got {name}=True, which is not affine; want it off")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("scheduler: got rescale_betas_zero_snr=True, whose first step has no signal; want it off")
    times = scheduler.timesteps.to("cpu")
    previous = times - config.num_train_timesteps // scheduler.num_inference_steps
    settings: dict[str, Any] = {
        "prediction_type": config.prediction_type,
        "previous_timesteps": previous,
        "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
    }
    return {
        "ddim": lambda level: ddim(scheduler.alphas_cumprod, times, level, **settings),
        "vp_sde": lambda level: vp_sde(scheduler.alphas_cumprod, times, level, **settings),
    }


def from_scheduler(
    scheduler: Any, sampler: str | None = None, noise_level: float = 0.0, window: Sequence[int] | None = None
) -> TransitionTable:
    """The table of a diffusers scheduler on which `set_timesteps` was called.

    Args:
        scheduler: `FlowMatchEulerDiscreteScheduler` or `DDIMScheduler`.
        sampler: for flow matching "ode" (default), "dance_sde", "flow_sde" or "cps"; for DDIM "ddim" (default),
            "vp_sde".
        noise_level: eta of the chosen sampler; the ODE takes none.
        window: step indices that stay stochastic; the others become the ODE (or DDIM with eta 0). Default: all.

    Raises:
        ValueError: another scheduler, a sampler that does not fit it, or a setting that makes its step not affine.
    """
    check_level("noise_level", noise_level)
    name, kinds = type(scheduler).__name__, {base.__name__ for base in type(scheduler).__mro__}
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("scheduler: got one without timesteps, call set_timesteps first")
    if "FlowMatchEulerDiscreteScheduler" in kinds:
        builders = _flow_builders(scheduler)
    elif "DDIMScheduler" in kinds:
        builders = _diffusion_builders(scheduler)
    else:
        raise ValueError(f"scheduler: got {name}, want FlowMatchEulerDiscreteScheduler or DDIMScheduler")
    plain = next(iter(builders))
    chosen = plain if sampler is None else sampler
    if not isinstance(chosen, str) or chosen not in builders:
        raise ValueError(f"sampler: got {shown(sampler)}, want one of {list(builders)} for {name}")
    if chosen == "ode" and noise_level > 0:
        raise ValueError(f"noise_level: got {noise_level} for the ODE, want 0 or a sampler of {list(builders)[1:]}")
    table = builders[chosen](noise_level)
    return table if window is None else mixed(table, builders[plain](0.0), window)
