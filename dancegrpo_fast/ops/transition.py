"""One denoising step and its log-probability: checks, registered ops, autograd, public functions."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import check_name
from ..checks import check_bool, check_dtype, shown
from ..kernels.transition import reference
from ..transitions import TransitionTable
from . import _quick
from ._call import SHARED, Noise, Transition, brief, empty_gradients, gradients_fake, implementation, split
from ._checks import (
    FLOATS,
    StepIndex,
    check_guidance,
    check_latents,
    check_like,
    check_per_sample,
    check_rounding,
    check_seed,
    check_step,
    check_table,
)
from ._library import linked, register
from ._overlap import overlap, overlaps_itself, storage_span


class TransitionStep(NamedTuple):
    """Result of `transition_step`."""

    latents: Tensor
    log_prob: Tensor
    denoised: Tensor | None

    def __repr__(self) -> str:
        return brief(self)


def _step_impl(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    call, (given, seed, sample_ids, denoised) = split(arguments)
    out = call.next_latents
    if overlaps_itself(out):
        raise ValueError(f"out: got strides {out.stride()} for shape {tuple(out.shape)}, want no element twice")
    start, stop = storage_span(out)
    names = ("latents", "model_output", "uncond_output", "noise")
    for name, value in zip(names, (call.latents, call.model_output, call.uncond_output, given), strict=True):
        if value is None:
            continue
        first, last = storage_span(value)
        if first < stop and start < last and overlap(out, value):
            raise ValueError(f"out: got memory that {name} lies in too, want memory of its own")
    outputs = _step_outputs(call, denoised)
    implementation(call).sample(call, Noise(given, seed, sample_ids), *outputs)
    return outputs


def _step_fake(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    call, rest = split(arguments)
    return _step_outputs(call, rest[-1])


def _step_outputs(call: Transition, denoised: bool) -> tuple[Tensor, Tensor | None]:
    clean = empty_like(call.latents, call.next_latents.dtype) if denoised else None
    return call.table.new_empty(call.batch), clean


def empty_like(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous room for numbers of the latents' shape."""
    # Twice as fast as torch.empty with a shape.
    return torch.empty_like(latents, dtype=dtype, memory_format=torch.contiguous_format)


def _log_prob_impl(*arguments: Any) -> Tensor:
    call, _ = split(arguments)
    log_prob = call.table.new_empty(call.batch)
    implementation(call).log_prob(call, log_prob)
    return log_prob


def _log_prob_fake(*arguments: Any) -> Tensor:
    call, _ = split(arguments)
    return call.table.new_empty(call.batch)


def _backward_impl(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    call, (grad_log_prob,) = split(arguments)
    grads = empty_gradients(call.model_output, call.uncond_output)
    implementation(call).log_prob_gradient(call, grad_log_prob, *grads)
    return grads


step_op = register(
    f"transition_step({SHARED.replace('Tensor next_latents', 'Tensor(a!) next_latents')},"
    " Tensor? noise, SymInt? seed, Tensor? sample_ids, bool denoised) -> (Tensor, Tensor)",
    _step_impl,
    _step_fake,
)
log_prob_op = register(f"transition_log_prob({SHARED}) -> Tensor", _log_prob_impl, _log_prob_fake)
_backward_op = register(
    f"transition_log_prob_backward({SHARED}, Tensor grad_log_prob) -> (Tensor, Tensor)", _backward_impl, gradients_fake
)


def save_shared(ctx: Any, shared: tuple[Any, ...], *more: Tensor | None) -> None:
    """Keeps an op's shared arguments, and further tensors, for the backward."""
    ctx.tensors = [i for i, value in enumerate(shared) if isinstance(value, Tensor)]
    ctx.settings = [None if isinstance(value, Tensor) else value for value in shared]
    ctx.save_for_backward(*(shared[i] for i in ctx.tensors), *more)


def saved_shared(ctx: Any) -> tuple[list[Any], tuple[Tensor | None, ...]]:
    """What `save_shared` kept: the shared arguments, and the further tensors."""
    shared, saved = list(ctx.settings), ctx.saved_tensors
    for i, value in zip(ctx.tensors, saved[: len(ctx.tensors)], strict=True):
        shared[i] = value
    return shared, saved[len(ctx.tensors) :]


def shared_gradients(shared: list[Any], grads: tuple[Tensor, Tensor | None]) -> tuple[Tensor | None, ...]:
    """A backward op's results in the places of the shared arguments: model_output and uncond_output."""
    return None, grads[0], None, None if shared[3] is None else grads[1], *(None,) * (len(shared) - 4)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *shared: Any) -> Tensor:
        save_shared(ctx, shared)
        return log_prob_op(*shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shared, _ = saved_shared(ctx)
        return shared_gradients(shared, _backward_op(*shared, grad))


def scored(*shared: Any) -> Tensor:
    """`transition_log_prob` of shared arguments that need no check."""
    log_prob: Tensor = linked(_LogProb, *shared)
    return log_prob


def _check_shared(
    latents: Tensor,
    model_output: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float | None,
    rounding: str,
    backend: str,
) -> tuple[float, StepIndex, bool]:
    check_latents(latents)
    check_like("model_output", model_output, latents)
    check_table(table)
    check_name(backend)
    scale = check_guidance(uncond_output, guidance_scale, latents)
    return scale, check_step(step, table, latents), check_rounding(rounding, table)


def _noise_for(
    noise: Tensor | torch.Generator | None, seed: int | None, table: TransitionTable, latents: Tensor
) -> Tensor | None:
    if seed is not None:
        if noise is not None:
            raise ValueError(f"noise: got {shown(noise)} together with seed, want one of them")
        return None
    if isinstance(noise, torch.Generator):
        if noise.device.type != latents.device.type:
            raise ValueError(f"noise: got a generator of {noise.device}, want one of latents' device, {latents.device}")
    elif noise is not None:
        if not isinstance(noise, Tensor):
            raise ValueError(f"noise: got {shown(noise)}, want a tensor, a torch.Generator or None")
        check_like("noise", noise, latents)
        return noise
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
        sample_ids: int64 `[B]`, the ids for `seed`; default 0 to B - 1. Draw with each (seed, id) once: a later
            iteration of training needs other ids or another seed.
        uncond_output, guidance_scale: classifier-free guidance `u + w (c - u)`, combined in the kernel.
        out_dtype: dtype of the next latents; default that of `latents`.
        out: where to write them (`[B, ...]`, its dtype is the storage dtype), with any strides that name no element
            twice. It may lie between the elements of the inputs, as a view of the same trajectory does, but share
            none with them: a step in place would read what it has just written.
        return_denoised: also give the estimate of x0, in the dtype of the next latents.
        rounding: "exact" computes in float32; "reference" rounds the products with the model output to its dtype, as
            the published implementations do.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; "auto" takes the best that can run the call.

    Returns:
        `TransitionStep(latents, log_prob, denoised)`: `[B, ...]`, float32 `[B]` (float64 for float64 inputs), and
        `[B, ...]` or None. Nothing is differentiable; score with `transition_log_prob` or `policy_loss`.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or range (lists and arrays are no tensors), an
            input that requires grad in grad mode, or `out` that does in any.
    """
    if sample_ids is None and out is None and out_dtype is None and return_denoised is False:
        found = _quick.transition_step(
            latents, model_output, table, step, noise, seed, uncond_output, guidance_scale, rounding, backend
        )
        if found is not None:
            return TransitionStep(*found, None)
    scale, index, reference_rounding = _check_shared(
        latents, model_output, table, step, uncond_output, guidance_scale, rounding, backend
    )
    check_bool("return_denoised", return_denoised)
    if return_denoised and not table.has_denoised:
        raise ValueError("return_denoised: got True for a table without p and q, want False or a table with them")
    if seed is not None:
        seed = check_seed(seed)
    given = _noise_for(noise, seed, table, latents)
    if torch.is_grad_enabled():
        inputs = {"latents": latents, "model_output": model_output, "uncond_output": uncond_output, "noise": given}
        for name, value in inputs.items():
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name}: got a tensor that requires grad, want sampling under torch.no_grad(); "
                    "transition_log_prob and policy_loss are differentiable"
                )
    if sample_ids is not None:
        if seed is None:
            raise ValueError("sample_ids: got ids without a seed, want both")
        check_per_sample("sample_ids", sample_ids, latents, (torch.int64,))
    if out is None:
        if out_dtype is not None:
            check_dtype("out_dtype", out_dtype, FLOATS)
        out = empty_like(latents, latents.dtype if out_dtype is None else out_dtype)
    else:
        check_like("out", out, latents)
        if out.requires_grad:
            raise ValueError("out: got a tensor that requires grad, want one that does not: the write has no gradient")
        if out_dtype is not None and out_dtype != out.dtype:
            raise ValueError(f"out_dtype: got {shown(out_dtype)} with out of {out.dtype}, want the same")
    packed = table.packed(latents.device, reference.compute_dtype(latents, model_output, uncond_output, out))
    log_prob, denoised = step_op(
        latents,
        model_output,
        out,
        uncond_output,
        scale,
        packed,
        index.per_sample,
        index.for_all,
        reference_rounding,
        backend,
        given,
        seed,
        sample_ids,
        return_denoised,
    )
    return TransitionStep(out, log_prob, denoised if return_denoised else None)


def check_scoring(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float | None,
    rounding: str,
    backend: str,
) -> tuple[Any, ...]:
    """The shared arguments of `transition_log_prob` and `policy_loss`, checked and detached where not trained."""
    scale, index, reference_rounding = _check_shared(
        latents, model_output, table, step, uncond_output, guidance_scale, rounding, backend
    )
    check_like("next_latents", next_latents, latents)
    dtype = reference.compute_dtype(latents, model_output, next_latents, uncond_output)
    return (
        latents.detach(),
        model_output,
        next_latents.detach(),
        uncond_output,
        scale,
        table.packed(latents.device, dtype),
        index.per_sample,
        index.for_all,
        reference_rounding,
        backend,
    )


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
    arguments = latents, model_output, next_latents, table, step, uncond_output, guidance_scale, rounding, backend
    found = _quick.transition_log_prob(*arguments)
    return scored(*check_scoring(*arguments)) if found is None else found
