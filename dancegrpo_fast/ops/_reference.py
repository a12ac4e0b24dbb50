"""The ops by their plain torch definition, on any device."""

import torch
from torch import Tensor

from ..kernels.policy_loss import reference as objective_reference
from ..kernels.transition import reference
from ._call import GradientTerms, LossOutputs, Noise, Objective, Transition


def _rows(call: Transition) -> Tensor:
    """Each sample's row, refusing indices outside the table where looking costs no host sync."""
    if call.step is not None and call.step.device.type == "cpu":
        outside = call.step[(call.step < 0) | (call.step >= len(call.table))]
        if len(outside):
            raise ValueError(f"step: got {int(outside[0])}, the table has rows 0 to {len(call.table) - 1}")
    return reference.table_rows(call.table, call.step, call.step_index, call.batch)


def _rounding_dtype(call: Transition) -> torch.dtype | None:
    """The dtype the published code holds its products in: the model's, but float32 once guidance was applied."""
    if not call.reference_rounding:
        return None
    return call.model_output.dtype if call.uncond_output is None else torch.float64


def sample(call: Transition, noise: Noise, log_prob: Tensor, denoised: Tensor | None) -> None:
    """Writes the next latents, their log-probability and, where asked for, the estimate of x0."""
    given = noise.given
    if noise.seed is not None:
        ids = noise.sample_ids
        if ids is None:
            ids = torch.arange(call.batch, device=call.latents.device)
        steps = call.step if call.step is not None else torch.full_like(ids, call.step_index)
        given = reference.normals(noise.seed, ids, steps, call.numel).reshape(call.latents.shape)
    stored, score, clean = reference.step(
        call.latents,
        call.model_output,
        call.uncond_output,
        call.guidance_scale,
        _rows(call),
        given,
        call.next_latents.dtype,
        _rounding_dtype(call),
    )
    call.next_latents.copy_(stored)
    log_prob.copy_(score)
    if denoised is not None:
        denoised.copy_(clean)


def log_prob(call: Transition, log_prob: Tensor) -> None:
    """Writes the log-probability of the next latents."""
    score = reference.score(
        call.latents,
        call.model_output,
        call.next_latents,
        call.uncond_output,
        call.guidance_scale,
        _rows(call),
        _rounding_dtype(call),
    )
    log_prob.copy_(score)


def _gradient(
    call: Transition,
    rows: Tensor,
    step_scale: Tensor,
    pull_scale: Tensor | None,
    pull: Tensor | None,
    mean_output: Tensor | None,
    grad_output: Tensor,
    grad_uncond: Tensor | None,
) -> None:
    by_output, by_uncond = reference.gradient(
        call.latents,
        call.model_output,
        call.next_latents,
        call.uncond_output,
        call.guidance_scale,
        rows,
        _rounding_dtype(call),
        step_scale,
        pull_scale,
        pull,
        mean_output,
    )
    grad_output.copy_(by_output)
    if grad_uncond is not None and by_uncond is not None:
        grad_uncond.copy_(by_uncond)


def log_prob_gradient(call: Transition, grad_log_prob: Tensor, grad_output: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients of `sum(grad_log_prob log_prob)` by the model outputs."""
    rows = _rows(call)
    scale = grad_log_prob.double() * reference.log_prob_slope(rows, call.numel)
    _gradient(call, rows, scale, None, None, None, grad_output, grad_uncond)


def _scored_rows(call: Transition, weight: Tensor | None) -> Tensor:
    """Each sample's row, refusing one without noise that counts where looking costs no host sync."""
    rows = _rows(call)
    if rows.device.type == "cpu":
        unscored = rows[:, reference.SCALE] == 0
        counted = unscored if weight is None else unscored & (weight != 0)
        if bool(counted.any()):
            row = call.step_index if call.step is None else int(call.step[counted][0])
            raise ValueError(f"step: got {row}, a row without noise, want one with noise, or weight 0")
    return rows


def policy_loss(call: Transition, objective: Objective, out: LossOutputs) -> None:
    """Writes the loss and everything that comes out of the same pass."""
    terms = objective_reference.policy_loss(
        call.latents,
        call.model_output,
        call.next_latents,
        call.uncond_output,
        call.guidance_scale,
        _scored_rows(call, objective.weight),
        _rounding_dtype(call),
        *objective,
    )
    for target, value in (
        (out.loss, terms.loss),
        (out.log_prob, terms.log_prob),
        (out.ratio, terms.ratio),
        (out.metrics, terms.metrics),
        (out.has_grad, (terms.step_scale != 0) | (terms.pull_scale != 0)),
        (out.step_scale, terms.step_scale),
        (out.pull_scale, terms.pull_scale),
    ):
        target.copy_(value)


def policy_loss_gradient(
    call: Transition, terms: GradientTerms, grad_output: Tensor, grad_uncond: Tensor | None
) -> None:
    """Writes the gradients of the loss by the model outputs."""
    _gradient(
        call,
        _rows(call),
        terms.step_scale.double() * terms.grad_loss,
        terms.pull_scale.double() * terms.grad_loss,
        terms.pull,
        terms.mean_output,
        grad_output,
        grad_uncond,
    )
