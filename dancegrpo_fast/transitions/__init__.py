"""Samplers as tables: every sampler of this field is affine in the latents and the model output.

    mean = a x + b v          x' = mean + tau eps          x0 = p x + q v

A table holds one row per step, computed once in float64 on the host; the kernels know no sampler.
Flow samplers follow `z_t = (1 - t) x0 + t eps`, `v = eps - x0`; diffusion samplers follow
`z_t = sqrt(A) x0 + sqrt(1 - A) eps`.
"""

from .diffusion import PredictionType, ddim, vp_sde
from .flow import cps, dance_sde, flow_sde, ode, shifted_sigmas
from .schedulers import from_scheduler
from .table import PACKED_COLUMNS, LogProbKind, TransitionTable, mixed

__all__ = [
    "PACKED_COLUMNS",
    "LogProbKind",
    "PredictionType",
    "TransitionTable",
    "cps",
    "dance_sde",
    "ddim",
    "flow_sde",
    "from_scheduler",
    "mixed",
    "ode",
    "shifted_sigmas",
    "vp_sde",
]
