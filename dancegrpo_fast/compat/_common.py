"""What the shims share: tables by schedule, and one step or score with its statistics."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.transition import reference
from ..ops._checks import check_rounding
from ..ops.transition import transition_log_prob, transition_step
from ..transitions import PACKED_COLUMNS, TransitionTable, dance_sde, flow_sde, mixed

# Both far above what a script uses at once; past them everything is built anew, not kept for ever.
_MAX_SCHEDULES, _MAX_SAMPLERS = 64, 16
_samplers: Any = WeakIdKeyDictionary()


class Sampler(NamedTuple):
    """A table, and `[T]` or None: what published Flow-SDE code multiplies the model output with, before `dt`."""

    table: TransitionTable
    factor: Tensor | None = None


class Outcome(NamedTuple):
    """One step: next latents, float32 log-probability `[B]`, and the mean where it was asked for."""

    next_latents: Tensor
    log_prob: Tensor
    mean: Tensor | None


def cached(name: str, schedule: Tensor, key: tuple[Any, ...], build: Callable[[Tensor], Sampler]) -> Sampler:
    """`build(schedule)`, once for every tensor, its in-place version and `key`; it is kept as long as the tensor lives.

    Raises:
        ValueError: `schedule` is not a tensor.
    """
    if not isinstance(schedule, Tensor):
        raise ValueError(f"{name}: got {type(schedule).__name__}, want a torch.Tensor")
    if schedule.is_inference():  # has no version
        return build(schedule)
    version, samplers = _samplers.get(schedule, (None, {}))
    if version != schedule._version:
        if len(_samplers) >= _MAX_SCHEDULES:
            _samplers.clear()
        samplers = {}
        _samplers[schedule] = (schedule._version, samplers)
    if key not in samplers:
        if len(samplers) >= _MAX_SAMPLERS:
            samplers.clear()
        samplers[key] = build(schedule)
    found: Sampler = samplers[key]
    return found


def unnormalized(table: TransitionTable) -> TransitionTable:
    """The same rows, scored without the Gaussian's constants."""
    return replace(table, kind=["unnormalized" if kind == "gaussian" else kind for kind in table.kind])


def flow_sampler(sigmas: Tensor, level: float, rounding: str, sigma_max: float | None = None) -> Sampler:
    """Flow-SDE, where `sigma_max` stands for a sigma of 1 under the root, by default the sigma after it.

    With `rounding="reference"` the coefficients are computed in the dtype of `sigmas` for Flow-GRPO's order of
    operations, `x a + (v k) dt`. The table is for `(v k) dt` in place of the model output, and `k` is the factor.
    """
    table = flow_sde(sigmas, level)
    if sigma_max is not None and bool(sigmas[0] == 1):
        if not 0.0 <= sigma_max < 1.0:
            raise ValueError(f"sigma_max: got {sigma_max}, want a number from 0 to below 1")
        table = mixed(dance_sde(sigmas, level / math.sqrt(1.0 - sigma_max)), table, [0])
    if rounding != "reference":
        return Sampler(table)
    values = sigmas.detach().cpu()
    s, n = values[:-1], values[1:]
    dt = n - s
    std = torch.sqrt(s / (1 - torch.where(s == 1, n[0] if sigma_max is None else sigma_max, s))) * level
    one, zero = torch.ones_like(table.a), torch.zeros_like(table.a)
    table = replace(
        table,
        a=(1 + std**2 / (2 * s) * dt).double(),
        b=one,
        tau=(std * torch.sqrt(-dt)).double(),
        q=zero,
        drift=one,
        drift_weight=one,
        denoised_weight=zero,
    )
    return Sampler(table, 1 + std**2 * (1 - s) / (2 * s))


def as_step(index: int | Tensor, latents: Tensor) -> int | Tensor:
    """An index as the ops take it; a tensor goes to the latents' device, without its dimensions if it is one number."""
    if not isinstance(index, Tensor):
        return index
    index = index.to(latents.device, torch.int64)
    return index.reshape(()) if index.numel() == 1 else index


def pick(values: Tensor, step: int | Tensor) -> Tensor:
    """Rows `[K, ...]` of `values` at a step or at `[K]` of them."""
    if isinstance(step, Tensor):
        return values.index_select(0, step.reshape(-1))  # `values[step]` reads a step without dimensions on the host
    return values[step : step + 1]


def column(values: Tensor, step: int | Tensor, latents: Tensor) -> Tensor:
    """`values[step]` broadcastable over `latents`: 0-dim for one step, `[K, 1, ...]` for `[K]` of them."""
    picked = pick(values.to(latents.device), step)
    single = not isinstance(step, Tensor) or step.ndim == 0
    return picked.reshape(()) if single else picked.reshape(-1, *(1,) * (latents.ndim - 1))


def statistic(table: TransitionTable, name: str, step: int | Tensor, latents: Tensor) -> Tensor:
    """A float64 column of the table at `step`, in the shape of `column`; to be rounded once, when it is returned."""
    return column(table.packed(latents.device, torch.float64)[:, PACKED_COLUMNS.index(name)], step, latents)


def result_dtype(latents: Tensor, model_output: Tensor) -> torch.dtype:
    """The dtype in which a peer holds `latents + sigma * model_output`."""
    return torch.promote_types(latents.dtype, model_output.dtype)


def noise_like_sum(latents: Tensor, model_output: Tensor) -> Tensor:
    """`torch.randn_like(latents + model_output)`, whose order of elements follows the strides, without the sum."""
    total = latents.detach().to("meta") + model_output.detach().to("meta")
    return torch.randn_like(total, device=latents.device)


def noise_like(model_output: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    """diffusers' `randn_tensor` of the model output's shape and device."""
    from diffusers.utils.torch_utils import randn_tensor

    drawn: Tensor = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
    return drawn


def mean_and_denoised(
    latents: Tensor,
    model_output: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    out_dtype: torch.dtype,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """The step's mean and its estimate of x0 in `out_dtype`, differentiable in the model output."""
    dtype = reference.compute_dtype(latents, model_output)
    rows = pick(table.packed(latents.device, dtype), step)
    rounded = model_output.dtype if check_rounding(rounding, table) else None
    found = reference.mean_and_denoised(latents.detach(), model_output.to(dtype), rows, rounded)
    return found[0].to(out_dtype), found[1].to(out_dtype)


def flow_denoised(latents: Tensor, model_output: Tensor, sigma: Tensor, rounding: str) -> Tensor:
    """`x - sigma v`, differentiable in the model output; the product is rounded to its dtype where so asked."""
    wide = model_output if rounding == "reference" else model_output.to(reference.compute_dtype(model_output))
    return (latents.detach() - sigma * wide).to(result_dtype(latents, model_output))


def advance(
    latents: Tensor,
    model_output: Tensor,
    sampler: Sampler,
    step: int | Tensor,
    prev_sample: Tensor | None,
    draw: Callable[[], Tensor | None],
    *,
    out_dtype: torch.dtype,
    rounding: str,
    backend: str,
    with_mean: bool = False,
) -> Outcome:
    """Samples the next latents from `draw()`, or scores `prev_sample`.

    The next latents never carry a gradient; the log-probability and the mean do, in the model output.
    """
    table, factor = sampler
    if factor is not None:
        # In torch: how it rounds a number without dimensions for a low-precision tensor depends on the device.
        step_size = statistic(table, "step_size", step, latents).to(factor.dtype)
        model_output = model_output * column(factor, step, latents) * -step_size
    with_mean = with_mean or factor is not None
    mean = mean_and_denoised(latents, model_output, table, step, out_dtype, rounding)[0] if with_mean else None
    if isinstance(step, Tensor) and step.ndim == 1 and len(step) != len(latents):
        step = step.expand(len(latents))
    noise = draw() if prev_sample is None else None
    if noise is not None and factor is not None and mean is not None:
        # The peers round the product of a low-precision noise; the kernel would not.
        prev_sample = (mean.detach() + statistic(table, "tau", step, latents).float() * noise).to(out_dtype)
    elif prev_sample is None:
        with torch.no_grad():
            found = transition_step(
                latents,
                model_output,
                table,
                step,
                noise=noise,
                out_dtype=out_dtype,
                rounding=rounding,
                backend=backend,
            )
        if not (torch.is_grad_enabled() and model_output.requires_grad):
            return Outcome(found.latents, found.log_prob, mean)
        prev_sample = found.latents
    log_prob = transition_log_prob(latents, model_output, prev_sample, table, step, rounding=rounding, backend=backend)
    return Outcome(prev_sample, log_prob, mean)
