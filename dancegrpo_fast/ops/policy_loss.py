"""The clipped policy loss of one denoising step: registered op, autograd, public function."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..kernels.policy_loss import reference
from ..kernels.transition.reference import gradient as transition_gradient
from ..transitions import TransitionTable
from . import _native
from ._checks import check_like, check_per_sample
from .transition import check_scoring, empty_gradients, gradients_fake, library, rounding_dtype, table_rows

library.define(
    "policy_loss(Tensor latents, Tensor model_output, Tensor next_latents, Tensor? uncond_output, float guidance_scale,"
    " Tensor table, Tensor? step, SymInt step_index, Tensor old_log_prob, Tensor advantages, Tensor weight,"
    " Tensor? reference_output, Tensor? old_output, float clip_range, float advantage_clip, float kl_weight,"
    " bool ratio_norm, bool reference_rounding, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "policy_loss_backward(Tensor latents, Tensor model_output, Tensor next_latents, Tensor? uncond_output,"
    " float guidance_scale, Tensor table, Tensor? step, SymInt step_index, Tensor grad_loss, Tensor step_scale,"
    " Tensor pull_scale, Tensor? pull, Tensor? mean_output, bool reference_rounding, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class PolicyMetrics(NamedTuple):
    """Means over the samples whose weight is not 0, as 0-dimensional tensors; nothing is read back to the host.

    `samples` counts them, `ratio_max_dev` is the largest `|ratio - 1|`, `approx_kl` is `mean(ratio - 1 - log ratio)`.
    """

    samples: Tensor
    clip_fraction: Tensor
    advantage_clip_fraction: Tensor
    ratio_mean: Tensor
    ratio_max_dev: Tensor
    approx_kl: Tensor
    reference_kl: Tensor
    policy_loss: Tensor


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`; only `loss` is differentiable."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    metrics: PolicyMetrics
    has_grad: Tensor


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _loss_impl(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    old_log_prob: Tensor,
    advantages: Tensor,
    weight: Tensor,
    reference_output: Tensor | None,
    old_output: Tensor | None,
    clip_range: float,
    advantage_clip: float,
    kl_weight: float,
    ratio_norm: bool,
    reference_rounding: bool,
    backend: str,
) -> Outputs:
    if backends.pick(backend, latents.device) == "reference":
        terms = reference.policy_loss(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            table_rows(table, step, step_index, latents.shape[0]),
            rounding_dtype(model_output, uncond_output, reference_rounding),
            old_log_prob,
            advantages,
            weight,
            reference_output,
            old_output,
            clip_range,
            advantage_clip,
            kl_weight,
            ratio_norm,
        )
        has_grad = (terms.step_scale != 0) | (terms.pull_scale != 0)
        scales = (terms.step_scale, terms.pull_scale)
        return terms.loss, terms.log_prob, terms.ratio, terms.metrics, has_grad, *scales
    out = _loss_fake(latents, model_output, next_latents, uncond_output, guidance_scale, table)
    step = None if step is None else step.contiguous()
    backends.cpu_module().policy_loss(
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
        _native.operand(reference_output),
        _native.operand(old_output),
        old_log_prob.data_ptr(),
        advantages.data_ptr(),
        weight.data_ptr(),
        clip_range,
        advantage_clip,
        kl_weight,
        ratio_norm,
        tuple(t.data_ptr() for t in out),
        table.dtype == torch.float64,
    )
    return out


def _loss_fake(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    *rest: Any,
) -> Outputs:
    batch = latents.shape[0]
    return (
        table.new_empty(()),
        table.new_empty(batch),
        table.new_empty(batch),
        table.new_empty(reference.METRICS),
        table.new_empty(batch, dtype=torch.bool),
        table.new_empty(batch, dtype=torch.float64),
        table.new_empty(batch, dtype=torch.float64),
    )


def _backward_impl(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    grad_loss: Tensor,
    step_scale: Tensor,
    pull_scale: Tensor,
    pull: Tensor | None,
    mean_output: Tensor | None,
    reference_rounding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_output, grad_uncond = empty_gradients(model_output, uncond_output, table)
    if backends.pick(backend, latents.device) == "reference":
        grads = transition_gradient(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            table_rows(table, step, step_index, latents.shape[0]),
            rounding_dtype(model_output, uncond_output, reference_rounding),
            step_scale * grad_loss,
            pull_scale * grad_loss,
            pull,
            mean_output,
        )
        grad_output.copy_(grads[0])
        if grads[1] is not None:
            grad_uncond.copy_(grads[1])
        return grad_output, grad_uncond
    step = None if step is None else step.contiguous()
    grad_loss = grad_loss.to(table.dtype)
    backends.cpu_module().policy_loss_gradient(
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
        grad_loss.data_ptr(),
        step_scale.data_ptr(),
        pull_scale.data_ptr(),
        _native.operand(pull),
        _native.operand(mean_output),
        _native.operand(grad_output),
        None if uncond_output is None else _native.operand(grad_uncond),
        table.dtype == torch.float64,
    )
    return grad_output, grad_uncond


for _name, _impl, _fake in (
    ("policy_loss", _loss_impl, _loss_fake),
    ("policy_loss_backward", _backward_impl, gradients_fake),
):
    library.impl(_name, _impl, "CPU")
    library.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"dgf::{_name}", _fake, lib=library)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        model_output: Tensor,
        uncond_output: Tensor | None,
        latents: Tensor,
        next_latents: Tensor,
        reference_output: Tensor | None,
        old_output: Tensor | None,
        table: Tensor,
        step: Tensor | None,
        old_log_prob: Tensor,
        advantages: Tensor,
        weight: Tensor,
        step_index: int,
        guidance_scale: float,
        clip_range: float,
        advantage_clip: float,
        kl_weight: float,
        ratio_norm: bool,
        reference_rounding: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        loss, log_prob, ratio, metrics, has_grad, step_scale, pull_scale = torch.ops.dgf.policy_loss(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            table,
            step,
            step_index,
            old_log_prob,
            advantages,
            weight,
            reference_output,
            old_output,
            clip_range,
            advantage_clip,
            kl_weight,
            ratio_norm,
            reference_rounding,
            backend,
        )
        ctx.mark_non_differentiable(log_prob, ratio, metrics, has_grad)
        mean_output = old_output if ratio_norm else None
        ctx.save_for_backward(
            model_output,
            uncond_output,
            latents,
            next_latents,
            table,
            step,
            step_scale,
            pull_scale,
            reference_output,
            mean_output,
        )
        ctx.settings = (step_index, guidance_scale, reference_rounding, backend)
        return loss, log_prob, ratio, metrics, has_grad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        model_output, uncond_output, latents, next_latents, table, step, *scales_and_targets = ctx.saved_tensors
        step_index, guidance_scale, reference_rounding, backend = ctx.settings
        grad_output, grad_uncond = torch.ops.dgf.policy_loss_backward(
            latents,
            model_output,
            next_latents,
            uncond_output,
            guidance_scale,
            table,
            step,
            step_index,
            grad,
            *scales_and_targets,
            reference_rounding,
            backend,
        )
        return grad_output, None if uncond_output is None else grad_uncond, *(None,) * 17


def _non_negative(name: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{name}: got {value}, want a number of at least 0")
    return float(value)


def policy_loss(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    uncond_output: Tensor | None = None,
    guidance_scale: float | None = None,
    reference_output: Tensor | None = None,
    kl_weight: float = 0.0,
    ratio_norm: bool = False,
    old_output: Tensor | None = None,
    weight: float | Tensor = 1.0,
    rounding: str = "exact",
    backend: str = "auto",
) -> PolicyLoss:
    """`mean(weight max(-A rho, -A clip(rho, 1 - c, 1 + c)))` over the batch, `rho = exp(log_prob - old_log_prob)`.

    One pass over the latents forward, one backward; a sample whose ratio is clipped reads nothing in the backward.

    Args:
        latents, model_output, next_latents: `[B, ...]`, any float dtypes and strides.
        table, step: as for `transition_step`; `step` may differ per sample.
        old_log_prob: float32 `[B]` (or float64), from sampling.
        advantages: float32 `[B]` (or float64); limited to +-`advantage_clip` (`inf` for no limit), and counted.
        clip_range: `c` above.
        uncond_output, guidance_scale: classifier-free guidance, combined in the kernel.
        reference_output, kl_weight: adds `kl_weight` times the KL to the step of a reference model, whose (guided)
            output at the same latents is `reference_output`.
        ratio_norm, old_output: GRPO-Guard's RatioNorm (arXiv 2510.22319) needs the (guided) model output of the
            rollout; the policy term is divided by the flow's step size.
        weight: a number or `[B]` float32; 0 leaves a sample out of loss, gradient and metrics.
        rounding, backend: as for `transition_step`.

    Returns:
        `PolicyLoss(loss, log_prob, ratio, metrics, has_grad)`: scalar, `[B]`, `[B]`, `PolicyMetrics`, bool `[B]`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    inputs = check_scoring(latents, model_output, next_latents, table, step, uncond_output, guidance_scale, rounding)
    dtype = inputs.table.dtype
    floats = (torch.float32, torch.float64)
    check_per_sample("old_log_prob", old_log_prob, latents, floats)
    check_per_sample("advantages", advantages, latents, floats)
    check_like("reference_output", reference_output, latents)
    check_like("old_output", old_output, latents)
    if not math.isfinite(kl_weight):
        raise ValueError(f"kl_weight: got {kl_weight}, want a finite number")
    if _non_negative("kl_weight", kl_weight) > 0 and reference_output is None:
        raise ValueError(f"reference_output: got None with kl_weight {kl_weight}, want the reference model's output")
    if ratio_norm and old_output is None:
        raise ValueError("old_output: got None with ratio_norm, want the model output of the rollout")
    if ratio_norm and not table.has_step_size:
        raise ValueError("table: got one without flow step sizes with ratio_norm, want a flow sampler")
    if isinstance(weight, Tensor):
        check_per_sample("weight", weight, latents, floats)
    elif not math.isfinite(weight):
        raise ValueError(f"weight: got {weight}, want a finite number or a tensor [B]")
    else:
        weight = torch.full((latents.shape[0],), float(weight), dtype=dtype, device=latents.device)
    loss, log_prob, ratio, metrics, has_grad = _PolicyLoss.apply(
        model_output,
        uncond_output,
        latents.detach(),
        next_latents.detach(),
        None if reference_output is None else reference_output.detach(),
        None if old_output is None else old_output.detach(),
        inputs.table,
        inputs.step.per_sample,
        old_log_prob.detach().to(dtype).contiguous(),
        advantages.detach().to(dtype).contiguous(),
        weight.detach().to(dtype).contiguous(),
        inputs.step.for_all,
        inputs.guidance_scale,
        _non_negative("clip_range", clip_range),
        _non_negative("advantage_clip", advantage_clip),
        float(kl_weight),
        ratio_norm,
        inputs.reference_rounding,
        backend,
    )
    return PolicyLoss(loss, log_prob, ratio, PolicyMetrics(*metrics.unbind()), has_grad)
