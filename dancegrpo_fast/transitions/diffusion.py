"""Samplers of variance-preserving diffusion: `z_t = sqrt(A) x0 + sqrt(1 - A) eps`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import SMALLEST, as_column, check_choice, check_level, check_number
from .table import TransitionTable

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class _DiffusionSchedule:
    """Cumulative alphas here and at the next step, and `x0 = p x + q v`, `eps = r x + w v`."""

    alpha: Tensor
    next_alpha: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    w: Tensor
    times: Tensor


def _diffusion_schedule(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    prediction_type: str,
    previous_timesteps: Tensor | Sequence[int] | None,
    final_alpha_cumprod: float,
) -> _DiffusionSchedule:
    check_choice("prediction_type", prediction_type, get_args(PredictionType))
    alphas = as_column("alphas_cumprod", alphas_cumprod)
    if bool((alphas <= 0).any()) or bool((alphas >= 1).any()):
        raise ValueError("alphas_cumprod: want values strictly between 0 and 1")
    times = as_column("timesteps", timesteps)
    if not torch.equal(times, times.round()):
        raise ValueError(f"timesteps: got {times.tolist()}, want whole numbers")
    times = times.to(torch.int64)
    if len(times) == 0:
        raise ValueError(f"timesteps: got shape {tuple(times.shape)}, want one dimension of at least one step")
    if bool((times < 0).any()) or bool((times >= len(alphas)).any()):
        raise ValueError(f"timesteps: got {times.tolist()}, want 0 to {len(alphas) - 1}, as alphas_cumprod has")
    if previous_timesteps is None:
        previous = torch.cat([times[1:], torch.tensor([-1])])
    else:
        previous = as_column("previous_timesteps", previous_timesteps).to(torch.int64)
    if previous.shape != times.shape:
        raise ValueError(f"previous_timesteps: got {tuple(previous.shape)}, want {tuple(times.shape)}")
    if not bool((previous < times).all()):
        if previous_timesteps is None:
            raise ValueError(f"timesteps: got {times.tolist()}, want strictly decreasing values")
        raise ValueError(f"previous_timesteps: got {previous.tolist()}, want each below {times.tolist()}")
    final_alpha_cumprod = check_number("final_alpha_cumprod", final_alpha_cumprod, SMALLEST, 1.0, "a number in (0, 1]")
    here = alphas[times]
    after = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final_alpha_cumprod)
    if not bool((after >= here).all()):
        raise ValueError("alphas_cumprod: want a decreasing sequence, so that no step loses signal")
    signal, noise = here.sqrt(), (1.0 - here).sqrt()
    zero, one = torch.zeros_like(here), torch.ones_like(here)
    if prediction_type == "epsilon":
        p, q, r, w = 1.0 / signal, -noise / signal, zero, one
    elif prediction_type == "v_prediction":
        p, q, r, w = signal, -noise, noise, signal
    else:
        p, q, r, w = zero, one, 1.0 / noise, -signal / noise
    return _DiffusionSchedule(here, after, p, q, r, w, times.to(torch.float64))


def _diffusion_table(d: _DiffusionSchedule, a: Tensor, b: Tensor, tau: Tensor) -> TransitionTable:
    unknown = torch.full_like(a, math.nan)
    return TransitionTable(
        a=a,
        b=b,
        tau=tau,
        p=d.p,
        q=d.q,
        kind=["gaussian"] * len(a),
        times=d.times,
        step_size=torch.zeros_like(a),
        drift=unknown,
        drift_weight=unknown,
        denoised_weight=unknown,
    )


def ddim(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    eta: float,
    prediction_type: PredictionType = "epsilon",
    *,
    previous_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_cumprod: float = 1.0,
) -> TransitionTable:
    """DDIM / DDPO step (arXiv 2010.02502, eq. 12 and 16).

    Args:
        alphas_cumprod: `[num_train_timesteps]`, decreasing, strictly between 0 and 1.
        timesteps: `[T]` training timesteps, strictly decreasing.
        eta: 0 is deterministic, 1 is DDPM's variance; at most what keeps `1 - A' - tau^2` from going negative.
        prediction_type: what the model predicts.
        previous_timesteps: `[T]`, where each step lands; negative: `final_alpha_cumprod`. Default: the next timestep.
        final_alpha_cumprod: cumulative alpha after the last step.

    Raises:
        ValueError: an argument out of its range.
    """
    d = _diffusion_schedule(alphas_cumprod, timesteps, prediction_type, previous_timesteps, final_alpha_cumprod)
    level = check_level("eta", eta)
    tau = level * torch.sqrt((1.0 - d.next_alpha) / (1.0 - d.alpha) * (1.0 - d.alpha / d.next_alpha))
    left = 1.0 - d.next_alpha - tau.square()
    if bool((left < -1e-12).any()):
        raise ValueError(f"eta: got {eta}, want less: the step would add more noise than the next level holds")
    direction = left.clamp(min=0.0).sqrt()
    signal = d.next_alpha.sqrt()
    return _diffusion_table(d, a=signal * d.p + direction * d.r, b=signal * d.q + direction * d.w, tau=tau)


def vp_sde(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    eta: float,
    prediction_type: PredictionType = "epsilon",
    *,
    previous_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_cumprod: float = 1.0,
) -> TransitionTable:
    """Euler-Maruyama step of DanceGRPO's reverse SDE for variance-preserving diffusion (arXiv 2505.07818).

    `dz = [f z - (1 + eta^2) / 2 g^2 score] dt + eta g dw`, whose marginals do not depend on `eta`: `eta = 0` is the
    probability-flow ODE and `eta = 1` the reverse SDE. With `F = log(A' / A) / 2` the integral of `f` over the step,
    `g^2 |dt| = 2 F`. Arguments and errors as `ddim`.
    """
    d = _diffusion_schedule(alphas_cumprod, timesteps, prediction_type, previous_timesteps, final_alpha_cumprod)
    level = check_level("eta", eta)
    growth = 0.5 * torch.log(d.next_alpha / d.alpha)
    score = -(1.0 + level**2) * growth / torch.sqrt(1.0 - d.alpha)
    return _diffusion_table(d, a=1.0 + growth + score * d.r, b=score * d.w, tau=level * torch.sqrt(2.0 * growth))
