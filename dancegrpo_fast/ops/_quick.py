"""Calls on contiguous CPU tensors, straight to the compiled module: a call of few elements is nothing but host cost.

What `transition_step`, `transition_log_prob` and `policy_loss` check one by one is looked at here in few steps. Each
function gives None where something is not as it wants it: the general path then runs the call or says what is wrong.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..checks import LARGEST
from ..kernels.policy_loss.reference import METRICS
from ..transitions import TransitionTable
from ._call import LossOutputs
from ._library import PLAIN, is_lazy, modes_watch
from ._native import DTYPE_CODES

# float64 computes in another dtype.
_CODES = {dtype: code for dtype, code in DTYPE_CODES.items() if dtype != torch.float64}
_TABLE = torch.device("cpu"), torch.float32


class _Step(NamedTuple):
    """What calls share, with the packed table, and what the module takes behind the operands."""

    batch: int
    numel: int
    rows: Tensor
    scale: float
    settings: tuple[Any, ...]


def _step(
    latents: Any, table: Any, step: Any, uncond_output: Any, guidance_scale: Any, rounding: Any, backend: Any
) -> _Step | None:
    if modes_watch() or type(latents) not in PLAIN or type(table) is not TransitionTable:
        return None
    if type(backend) is not str or backend != "auto" or type(rounding) is not str or rounding != "exact":
        return None
    if backends._cpu()[0] is None:
        return None
    shape, total = latents.shape, latents.numel()
    if not 2 <= len(shape) <= 9 or total == 0:
        return None
    batch = shape[0]
    if type(step) is int:
        if not 0 <= step < len(table.kind):
            return None
        row = 0, step
    elif _is_column(step, batch, torch.int64):
        row = step.data_ptr(), 0
    else:
        return None
    scale = 1.0
    if uncond_output is not None or guidance_scale is not None:
        if uncond_output is None or type(guidance_scale) is not float or not -LARGEST <= guidance_scale <= LARGEST:
            return None
        scale = guidance_scale
    rows, numel = table._packed[_TABLE], total // batch
    threads = 1 if total < backends.MIN_ELEMENTS_PER_THREAD else backends.threads_for(total)
    settings = (batch, numel, rows.data_ptr(), len(table.kind), *row, scale, False, False, threads)
    return _Step(batch, numel, rows, scale, settings)


def _is_column(one: Any, batch: int, dtype: torch.dtype) -> bool:
    """Contiguous `[B]` on the CPU."""
    if type(one) not in PLAIN or one.dtype is not dtype or not one.is_cpu or one.layout is not torch.strided:
        return False
    return bool(one.shape == (batch,) and one.is_contiguous() and not is_lazy(one))


def _operands(numel: int, like: Tensor, *others: Any) -> list[Any] | None:
    """`like`, and what is of its shape or None, as the module reads them."""
    shape = like.shape
    found: list[tuple[int, int, int] | None] = []
    for one in (like, *others):
        if one is None:
            found.append(None)
            continue
        if type(one) not in PLAIN or not one.is_cpu or one.shape != shape or one.layout is not torch.strided:
            return None
        code = _CODES.get(one.dtype)
        if code is None or not one.is_contiguous() or is_lazy(one):
            return None
        found.append((one.data_ptr(), code, numel))
    return found


def _require_grad(*tensors: Tensor | None) -> bool:
    return any(one is not None and one.requires_grad for one in tensors)


def transition_step(
    latents: Any,
    model_output: Any,
    table: Any,
    step: Any,
    noise: Any,
    seed: Any,
    uncond_output: Any,
    guidance_scale: Any,
    rounding: Any,
    backend: Any,
) -> tuple[Tensor, Tensor] | None:
    """Next latents and their log-probability, of a call with noise or a seed, and nothing beside."""
    call = _step(latents, table, step, uncond_output, guidance_scale, rounding, backend)
    if call is None or (noise is None) == (seed is None):
        return None
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        return None
    operands = _operands(call.numel, latents, model_output, uncond_output, noise)
    if operands is None or (torch.is_grad_enabled() and _require_grad(latents, model_output, uncond_output, noise)):
        return None
    out, log_prob = torch.empty_like(latents), call.rows.new_empty(call.batch)
    shared = *operands[:3], (out.data_ptr(), *operands[0][1:]), *call.settings
    backends.cpu_module().transition_sample(shared, operands[3], seed, 0, None, log_prob.data_ptr())
    return out, log_prob


def transition_log_prob(
    latents: Any,
    model_output: Any,
    next_latents: Any,
    table: Any,
    step: Any,
    uncond_output: Any,
    guidance_scale: Any,
    rounding: Any,
    backend: Any,
) -> Tensor | None:
    """The log-probability, of a call that needs no gradient."""
    call = _step(latents, table, step, uncond_output, guidance_scale, rounding, backend)
    if call is None:
        return None
    operands = _operands(call.numel, latents, model_output, uncond_output, next_latents)
    if operands is None or (torch.is_grad_enabled() and _require_grad(model_output, uncond_output)):
        return None
    log_prob = call.rows.new_empty(call.batch)
    backends.cpu_module().transition_log_prob((*operands, *call.settings), log_prob.data_ptr())
    return log_prob


class Loss(NamedTuple):
    """A checked call of the loss: what computes it, its guidance scale and its packed table."""

    run: Callable[[], LossOutputs]
    scale: float
    rows: Tensor


def policy_loss(
    latents: Any,
    model_output: Any,
    next_latents: Any,
    table: Any,
    step: Any,
    old_log_prob: Any,
    advantages: Any,
    clip_range: Any,
    advantage_clip: Any,
    uncond_output: Any,
    guidance_scale: Any,
    reference_output: Any,
    kl_weight: Any,
    weight: Any,
    rounding: Any,
    backend: Any,
) -> Loss | None:
    """The loss of a call without ratio_norm, with one weight for all samples that is not 0."""
    call = _step(latents, table, step, uncond_output, guidance_scale, rounding, backend)
    if call is None or type(weight) is not float or weight == 0.0 or not -LARGEST <= weight <= LARGEST:
        return None
    low, high = clip_range if type(clip_range) is tuple and len(clip_range) == 2 else (clip_range, clip_range)
    levels = low, high, advantage_clip, kl_weight
    for level in levels:
        if type(level) is not float or not level >= 0.0:
            return None
    if kl_weight > LARGEST or (reference_output is None and kl_weight > 0.0):
        return None
    if table.unscored and (type(step) is not int or step in table.unscored):
        return None
    rows, batch = call.rows, call.batch
    if not _is_column(old_log_prob, batch, torch.float32) or not _is_column(advantages, batch, torch.float32):
        return None
    operands = _operands(call.numel, latents, model_output, uncond_output, next_latents, reference_output)
    if operands is None or _require_grad(latents, next_latents, reference_output):
        return None
    shared, reference = (*operands[:4], *call.settings), operands[4]

    def run() -> LossOutputs:
        weights = None if weight == 1.0 else rows.new_full((batch,), weight)
        out = LossOutputs(
            rows.new_empty(()),
            rows.new_empty(batch),
            rows.new_empty(batch),
            rows.new_empty(METRICS),
            rows.new_empty(batch, dtype=torch.bool),
            rows.new_empty(batch),
            rows.new_empty(batch),
        )
        backends.cpu_module().policy_loss(
            *(shared, reference, None, old_log_prob.data_ptr(), advantages.data_ptr()),
            *(0 if weights is None else weights.data_ptr(), *levels, False),
            tuple([one.data_ptr() for one in out]),
        )
        return out

    return Loss(run, call.scale, rows)
