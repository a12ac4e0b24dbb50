"""Samplers of rectified flows: `z_t = (1 - t) x0 + t eps`, `v = eps - x0`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import SMALLEST, as_column, check_int, check_level, check_number
from .table import TransitionTable


def _check_sigmas(sigmas: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    column = as_column("sigmas", sigmas)
    if len(column) < 2:
        raise ValueError(f"sigmas: got {len(column)} values, want at least 2 (one more than steps)")
    if bool((column < 0).any()) or bool((column > 1).any()):
        raise ValueError(f"sigmas: got {column.tolist()}, want values from 1 down to 0")
    if not bool((column[1:] < column[:-1]).all()):
        raise ValueError(f"sigmas: got {column.tolist()}, want strictly decreasing values")
    return column[:-1], column[1:]


def shifted_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """Flow schedule `shift u / (1 + (shift - 1) u)` with `u` from 1 to 0: float64 `[num_steps + 1]`.

    Raises:
        ValueError: `num_steps` not from 1 to 2^20, or `shift` not positive.
    """
    num_steps = check_int("num_steps", num_steps, 1, 2**20)
    shift = check_number("shift", shift, SMALLEST, wanted="a positive number")
    u = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * u / (1.0 + (shift - 1.0) * u)


def _flow_sde_rows(s: Tensor, n: Tensor, level: Tensor) -> TransitionTable:
    dt = n - s
    pull = level.square() * dt / (2.0 * s.square())
    tau = level * torch.sqrt(-dt)
    return TransitionTable(
        a=1.0 + pull * s,
        b=dt + pull * s * (1.0 - s),
        tau=tau,
        p=torch.ones_like(s),
        q=-s,
        kind=["gaussian"] * len(s),
        times=s,
        step_size=-dt,
        drift=dt,
        drift_weight=torch.ones_like(s),
        denoised_weight=-pull * (1.0 - s),
    )


def dance_sde(sigmas: Tensor | Sequence[float], eta: float) -> TransitionTable:
    """DanceGRPO's rectified-flow SDE (arXiv 2505.07818).

    Args:
        sigmas: `[T + 1]`, strictly decreasing within [0, 1].
        eta: noise level, at least 0; 0 gives the Euler ODE step.

    Raises:
        ValueError: bad `sigmas` or `eta`.
    """
    s, n = _check_sigmas(sigmas)
    return _flow_sde_rows(s, n, torch.full_like(s, check_level("eta", eta)))


def flow_sde(sigmas: Tensor | Sequence[float], noise_level: float) -> TransitionTable:
    """Flow-GRPO's SDE (arXiv 2505.05470): Dance-SDE with `eta = noise_level sqrt(s / (1 - s))`, one step on at 1.

    Raises:
        ValueError: bad `sigmas` or `noise_level`.
    """
    s, n = _check_sigmas(sigmas)
    level = check_level("noise_level", noise_level)
    guarded = torch.where(s == 1.0, n[0], s)
    return _flow_sde_rows(s, n, level * torch.sqrt(s / (1.0 - guarded)))


def cps(sigmas: Tensor | Sequence[float], noise_level: float) -> TransitionTable:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): the noise left is exactly the next sigma's.

    Args:
        sigmas: `[T + 1]`, strictly decreasing within [0, 1].
        noise_level: from 0 (deterministic) to 1 (all noise drawn anew).

    Raises:
        ValueError: bad `sigmas` or `noise_level`.
    """
    s, n = _check_sigmas(sigmas)
    angle = check_level("noise_level", noise_level, 1.0) * math.pi / 2.0
    kept = n * math.cos(angle)
    return TransitionTable(
        a=(1.0 - n) + kept,
        b=-s * (1.0 - n) + kept * (1.0 - s),
        tau=n * math.sin(angle),
        p=torch.ones_like(s),
        q=-s,
        kind=["quadratic"] * len(s),
        times=s,
        step_size=s - n,
        drift=1.0 - s,
        drift_weight=kept,
        denoised_weight=1.0 - n,
    )


def ode(sigmas: Tensor | Sequence[float]) -> TransitionTable:
    """Euler step of the rectified-flow ODE; log-probability 0.

    Raises:
        ValueError: bad `sigmas`.
    """
    s, n = _check_sigmas(sigmas)
    zero = torch.zeros_like(s)
    return TransitionTable(
        a=torch.ones_like(s),
        b=n - s,
        tau=zero,
        p=torch.ones_like(s),
        q=-s,
        kind=["none"] * len(s),
        times=s,
        step_size=s - n,
        drift=n - s,
        drift_weight=torch.ones_like(s),
        denoised_weight=zero,
    )
