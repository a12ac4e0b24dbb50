"""One denoising step and its log-probability: checks, registered ops, dispatch, autograd, public functions."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..kernels.transition import reference
from ..transitions import TransitionTable
from . import _native
from ._checks import (
    FLOATS,
    StepIndex,
    check_guidance,
    check_latents,
    check_like,
    check_per_sample,
    check_rounding,
    check_step,
)

library = torch.library.Library("dgf", "DEF")
_PT2 = (torch.Tag.pt2_compliant_tag,)

library.define(
    "transition_step(Tensor(a!) out, Tensor latents, Tensor model_output, Tensor? uncond_output, float guidance_scale,"
    " Tensor table, Tensor? step, SymInt step_index, Tensor? noise, SymInt? seed, Tensor? sample_ids, bool denoised,"
    " bool reference_rounding, str backend) -> (Tensor, Tensor)",
    tags=_PT2,
)
library.define(
    "transition_log_prob(Tensor latents, Tensor model_output, Tensor next_latents, Tensor? uncond_output,"
    " float guidance_scale, Tensor table, Tensor? step, SymInt step_index, bool reference_rounding, str backend)"
    " -> Tensor",
    tags=_PT2,
)
library.define(
    "transition_log_prob_backward(Tensor latents, Tensor model_output, Tensor next_latents, Tensor? uncond_output,"
    " float guidance_scale, Tensor table, Tensor? step, SymInt step_index, Tensor grad_log_prob,"
    " bool reference_rounding, str backend) -> (Tensor, Tensor)",
    tags=_PT2,
)


class TransitionStep(NamedTuple):
    """Result of `transition_step`."""

    latents: Tensor
    log_prob: Tensor
    denoised: Tensor | None


def rounding_dtype(output: Tensor, uncond: Tensor | None, reference_rounding: bool) -> torch.dtype | None:
    """The dtype the published code holds its products in: the model's, but float32 once guidance was applied."""
    return output.dtype if reference_rounding and uncond is None else None if not reference_rounding else torch.float64


def table_rows(table: Tensor, step: Tensor | None, step_index: int, batch: int) -> Tensor:
    """Each sample's row for the reference, refusing indices outside the table where looking costs no host sync."""
    if step is not None and step.device.type == "cpu":
        outside = step[(step < 0) | (step >= len(table))]
        if len(outside):
            raise ValueError(f"step: got {int(outside[0])}, the table has rows 0 to {len(table) - 1}")
    return reference.table_rows(table, step, step_index, batch)


def _step_impl(
    out: Tensor,
    latents: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    noise: Tensor | None,
    seed: int | None,
    sample_ids: Tensor | None,
    denoised: bool,
    reference_rounding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch = latents.shape[0]
    inputs = (latents, model_output, uncond_output, noise)
    if any(t is not None and t.data_ptr() == out.data_ptr() for t in inputs):
        raise ValueError("out: got the memory of an input, want memory of its own")
    if backends.pick(backend, latents.device) == "reference":
        rows = table_rows(table, step, step_index, batch)
        if seed is not None:
            ids = torch.arange(batch, device=latents.device) if sample_ids is None else sample_ids
            steps = step if step is not None else torch.full_like(ids, step_index)
            noise = reference.normals(seed, ids, steps, latents[0].numel()).reshape(latents.shape)
        rounded = rounding_dtype(model_output, uncond_output, reference_rounding)
        stored, log_prob, clean = reference.step(
            latents, model_output, uncond_output, guidance_scale, rows, noise, out.dtype, rounded
        )
        out.copy_(stored)
        if not denoised:
            return log_prob, table.new_empty(0)
        return log_prob, torch.empty(clean.shape, dtype=out.dtype, device=out.device).copy_(clean)
    module = backends.cpu_module()
    log_prob = torch.empty(batch, dtype=table.dtype)
    clean = torch.empty(latents.shape, dtype=out.dtype) if denoised else table.new_empty(0)
    step = None if step is None else step.contiguous()
    sample_ids = None if sample_ids is None else sample_ids.contiguous()
    module.transition_sample(
        _native.transition(
            latents, model_output, uncond_output, out, table, step, step_index, guidance_scale, reference_rounding
        ),
        _native.operand(noise),
        seed,
        _native.address(sample_ids),
        _native.operand(clean) if denoised else None,
        log_prob.data_ptr(),
        table.dtype == torch.float64,
    )
    # The write went through a raw pointer, which autograd's version counter does not see.
    torch.autograd.graph.increment_version(out)
    return log_prob, clean


def _step_fake(
    out: Tensor,
    latents: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    noise: Tensor | None,
    seed: int | None,
    sample_ids: Tensor | None,
    denoised: bool,
    reference_rounding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    log_prob = latents.new_empty(latents.shape[0], dtype=table.dtype)
    clean = latents.new_empty(latents.shape, dtype=out.dtype) if denoised else table.new_empty(0)
    return log_prob, clean


def _log_prob_impl(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    reference_rounding: bool,
    backend: str,
) -> Tensor:
    batch = latents.shape[0]
    if backends.pick(backend, latents.device) == "reference":
        rows = table_rows(table, step, step_index, batch)
        rounded = rounding_dtype(model_output, uncond_output, reference_rounding)
        return reference.score(
            latents, model_output, next_latents, uncond_output, guidance_scale, rows, rounded
        ).contiguous()
    log_prob = torch.empty(batch, dtype=table.dtype)
    step = None if step is None else step.contiguous()
    backends.cpu_module().transition_log_prob(
        _native.transition(
            latents,
            model_output,
            uncond_output,
            next_latents,
            table,
            step,
            step_index,
            guidance_scale,
            reference_rounding,
        ),
        log_prob.data_ptr(),
        table.dtype == torch.float64,
    )
    return log_prob


def _log_prob_fake(latents: Tensor, model_output: Tensor, next_latents: Tensor, *rest: Any) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=rest[2].dtype)


def _backward_impl(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    grad_log_prob: Tensor,
    reference_rounding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_output, grad_uncond = empty_gradients(model_output, uncond_output, table)
    if backends.pick(backend, latents.device) == "reference":
        rows = table_rows(table, step, step_index, latents.shape[0])
        numel = latents.numel() // latents.shape[0]
        grads = reference.gradient(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            rows,
            rounding_dtype(model_output, uncond_output, reference_rounding),
            grad_log_prob.double() * reference.log_prob_slope(rows, numel),
        )
        grad_output.copy_(grads[0])
        if grads[1] is not None:
            grad_uncond.copy_(grads[1])
        return grad_output, grad_uncond
    step = None if step is None else step.contiguous()
    grad_log_prob = grad_log_prob.to(table.dtype).contiguous()
    backends.cpu_module().transition_log_prob_gradient(
        _native.transition(
            latents,
            model_output,
            uncond_output,
            next_latents,
            table,
            step,
            step_index,
            guidance_scale,
            reference_rounding,
        ),
        grad_log_prob.data_ptr(),
        _native.operand(grad_output),
        None if uncond_output is None else _native.operand(grad_uncond),
        table.dtype == torch.float64,
    )
    return grad_output, grad_uncond


def empty_gradients(model_output: Tensor, uncond_output: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the gradients of both outputs; without guidance the second is empty."""
    empty = table.new_empty(0) if uncond_output is None else torch.empty_like(uncond_output)
    return torch.empty_like(model_output), empty


def gradients_fake(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Shapes of a backward op's results."""
    return empty_gradients(model_output, uncond_output, table)


for _name, _impl, _fake in (
    ("transition_step", _step_impl, _step_fake),
    ("transition_log_prob", _log_prob_impl, _log_prob_fake),
    ("transition_log_prob_backward", _backward_impl, gradients_fake),
):
    library.impl(_name, _impl, "CPU")
    library.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"dgf::{_name}", _fake, lib=library)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        model_output: Tensor,
        uncond_output: Tensor | None,
        latents: Tensor,
        next_latents: Tensor,
        table: Tensor,
        step: Tensor | None,
        step_index: int,
        guidance_scale: float,
        reference_rounding: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(model_output, uncond_output, latents, next_latents, table, step)
        ctx.settings = (step_index, guidance_scale, reference_rounding, backend)
        log_prob: Tensor = torch.ops.dgf.transition_log_prob(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            table,
            step,
            step_index,
            reference_rounding,
            backend,
        )
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        model_output, uncond_output, latents, next_latents, table, step = ctx.saved_tensors
        step_index, guidance_scale, reference_rounding, backend = ctx.settings
        grad_output, grad_uncond = torch.ops.dgf.transition_log_prob_backward(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            table,
            step,
            step_index,
            grad,
            reference_rounding,
            backend,
        )
        return grad_output, None if uncond_output is None else grad_uncond, *(None,) * 8


def _noise_for(
    noise: Tensor | torch.Generator | None, seed: int | None, table: TransitionTable, latents: Tensor
) -> Tensor | None:
    if seed is not None and noise is not None:
        raise ValueError("noise: got a value together with seed, want one of them")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)) or seed < 0 or seed >= 2**63:
            raise ValueError(f"seed: got {seed}, want an int from 0 to 2^63 - 1")
        return None
    if isinstance(noise, Tensor):
        check_like("noise", noise, latents)
        return noise
    if noise is not None and not isinstance(noise, torch.Generator):
        raise ValueError(f"noise: got {type(noise).__name__}, want a tensor, a torch.Generator or None")
    if table.is_deterministic:
        return None
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    return torch.randn(latents.shape, generator=noise, device=latents.device, dtype=dtype)


def transition_step(
    latents: Tensor,
    model_output: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    *,
    noise: Tensor | torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    return_denoised: bool = False,
    rounding: str = "exact",
    backend: str = "auto",
) -> TransitionStep:
    """One sampling step `x' = a x + b v + tau eps` and the log-probability of `x'` as stored.

    Args:
        latents: `[B, ...]`, float32, bfloat16, float16 or float64, any strides.
        model_output: `[B, ...]`, any of these dtypes: what the model predicted at `latents`.
        table: the sampler.
        step: row of the table, or int64 `[B]` of them.
        noise: `[B, ...]` standard normals, or a `torch.Generator` to draw them from. Without `noise` and `seed` they
            come from torch's default generator.
        seed: 0 to 2^63 - 1; the kernel draws Philox normals keyed by (seed, sample id, step, element), which do not
            depend on the batch.
        sample_ids: int64 `[B]`, the ids for `seed`; default 0 to B - 1.
        uncond_output, guidance_scale: classifier-free guidance `u + w (c - u)`, combined in the kernel.
        out_dtype: dtype of the next latents; default that of `latents`.
        out: where to write them (`[B, ...]`, any strides, its dtype is the storage dtype); must not overlap the inputs.
        return_denoised: also give the estimate of x0, in the dtype of the next latents.
        rounding: "exact" computes in float32; "reference" rounds the products with the model output to its dtype, as
            the published implementations do.
        backend: "auto", "cpu" or "reference".

    Returns:
        `TransitionStep(latents, log_prob, denoised)`: `[B, ...]`, float32 `[B]` (float64 for float64 inputs), and
        `[B, ...]` or None. Nothing is differentiable; score with `transition_log_prob` or `policy_loss`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, or one that requires grad in grad mode.
    """
    check_latents(latents)
    check_like("model_output", model_output, latents)
    scale = check_guidance(uncond_output, guidance_scale, latents)
    index = check_step(step, table, latents)
    reference_rounding = check_rounding(rounding, table)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (latents, model_output, uncond_output)
    ):
        raise ValueError(
            "model_output: got a tensor that requires grad, want sampling under torch.no_grad(); "
            "transition_log_prob and policy_loss are differentiable"
        )
    given = _noise_for(noise, seed, table, latents)
    if sample_ids is not None:
        if seed is None:
            raise ValueError("sample_ids: got ids without a seed, want both")
        check_per_sample("sample_ids", sample_ids, latents, (torch.int64,))
    if out is None:
        dtype = latents.dtype if out_dtype is None else out_dtype
        if dtype not in FLOATS:
            raise ValueError(f"out_dtype: got {dtype}, want one of {', '.join(map(str, FLOATS))}")
        out = torch.empty(latents.shape, dtype=dtype, device=latents.device)
    else:
        check_like("out", out, latents)
        if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(f"out: got strides {out.stride()} for shape {tuple(out.shape)}, want no element twice")
        if out_dtype is not None and out_dtype != out.dtype:
            raise ValueError(f"out_dtype: got {out_dtype} with out of {out.dtype}, want the same")
    packed = table.packed(latents.device, reference.compute_dtype(latents, model_output, uncond_output, out))
    log_prob, denoised = torch.ops.dgf.transition_step(
        out,
        latents,
        model_output,
        uncond_output,
        scale,
        packed,
        index.per_sample,
        index.for_all,
        given,
        seed,
        sample_ids,
        return_denoised,
        reference_rounding,
        backend,
    )
    return TransitionStep(out, log_prob, denoised if return_denoised else None)


class ScoringInputs(NamedTuple):
    """Checked inputs of the differentiable ops."""

    table: Tensor
    step: StepIndex
    guidance_scale: float
    reference_rounding: bool


def check_scoring(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float | None,
    rounding: str,
) -> ScoringInputs:
    """The checks that `transition_log_prob` and `policy_loss` share."""
    check_latents(latents)
    check_like("model_output", model_output, latents)
    check_like("next_latents", next_latents, latents)
    scale = check_guidance(uncond_output, guidance_scale, latents)
    index = check_step(step, table, latents)
    reference_rounding = check_rounding(rounding, table)
    dtype = reference.compute_dtype(latents, model_output, next_latents, uncond_output)
    return ScoringInputs(table.packed(latents.device, dtype), index, scale, reference_rounding)


def transition_log_prob(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float | None = None,
    rounding: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Log-probability of `next_latents` given `latents`, a mean over elements, differentiable in the outputs only.

    Args:
        latents, model_output, next_latents: `[B, ...]`, any float dtypes and strides.
        table, step: as for `transition_step`.
        uncond_output, guidance_scale: classifier-free guidance, combined in the kernel.
        rounding, backend: as for `transition_step`.

    Returns:
        float32 `[B]` (float64 for float64 inputs). Rows with `tau = 0` score 0 and give no gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    inputs = check_scoring(latents, model_output, next_latents, table, step, uncond_output, guidance_scale, rounding)
    log_prob: Tensor = _LogProb.apply(
        model_output,
        uncond_output,
        latents.detach(),
        next_latents.detach(),
        inputs.table,
        inputs.step.per_sample,
        inputs.step.for_all,
        inputs.guidance_scale,
        inputs.reference_rounding,
        backend,
    )
    return log_prob
