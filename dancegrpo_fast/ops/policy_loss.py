"""The clipped policy loss of one denoising step: registered op, autograd, public function."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import register_pytree_node

from ..checks import check_bool, check_level, check_number
from ..kernels.policy_loss import reference
from ..transitions import TransitionTable
from . import _quick
from ._call import (
    SHARED,
    GradientTerms,
    LossOutputs,
    Objective,
    brief,
    empty_gradients,
    gradients_fake,
    implementation,
    split,
)
from ._checks import check_optional, check_per_sample
from ._library import linked, register
from .transition import check_scoring, save_shared, saved_shared, shared_gradients


def _member(index: int) -> Any:
    return property(lambda metrics: metrics.values[index])


class PolicyMetrics(Sequence[Tensor]):
    """Means over the samples whose weight is not 0, as 0-dimensional tensors; nothing is read back to the host.

    `samples` counts them, `ratio_max_dev` is the largest `|ratio - 1|`, `approx_kl` is `mean(ratio - 1 - log ratio)`.
    Members in their order are `_fields`, as of a named tuple; each is a view of `values`, made when it is asked for.

    Args:
        values: `[8]`, in the loss's dtype.
    """

    samples: Tensor = _member(0)
    clip_fraction: Tensor = _member(1)
    advantage_clip_fraction: Tensor = _member(2)
    ratio_mean: Tensor = _member(3)
    ratio_max_dev: Tensor = _member(4)
    approx_kl: Tensor = _member(5)
    reference_kl: Tensor = _member(6)
    policy_loss: Tensor = _member(7)

    _fields: ClassVar[tuple[str, ...]] = tuple(name for name, value in vars().items() if isinstance(value, property))

    def __init__(self, values: Tensor):
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values.unbind()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.unbind())

    def __len__(self) -> int:
        return len(self._fields)

    def _asdict(self) -> dict[str, Tensor]:
        return dict(zip(self._fields, self, strict=True))

    def __repr__(self) -> str:
        return brief(self)


register_pytree_node(
    PolicyMetrics,
    lambda metrics: ([metrics.values], None),
    lambda values, _: PolicyMetrics(*values),
    serialized_type_name="dancegrpo_fast.PolicyMetrics",
)


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`; only `loss` is differentiable."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    metrics: PolicyMetrics
    has_grad: Tensor

    def __repr__(self) -> str:
        return brief(self)


def _loss_impl(*arguments: Any) -> LossOutputs:
    call, rest = split(arguments)
    out = _loss_fake(*arguments)
    implementation(call).policy_loss(call, Objective(*rest), out)
    return out


def _loss_fake(*arguments: Any) -> LossOutputs:
    call, _ = split(arguments)
    table, batch = call.table, call.batch
    return LossOutputs(
        loss=table.new_empty(()),
        log_prob=table.new_empty(batch),
        ratio=table.new_empty(batch),
        metrics=table.new_empty(reference.METRICS),
        has_grad=table.new_empty(batch, dtype=torch.bool),
        step_scale=table.new_empty(batch),
        pull_scale=table.new_empty(batch),
    )


def _backward_impl(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    call, rest = split(arguments)
    grads = empty_gradients(call.model_output, call.uncond_output)
    implementation(call).policy_loss_gradient(call, GradientTerms(*rest), *grads)
    return grads


_loss_op = register(
    f"policy_loss({SHARED}, Tensor old_log_prob, Tensor advantages, Tensor? weight, Tensor? reference_output,"
    " Tensor? old_output, float clip_low, float clip_high, float advantage_clip, float kl_weight, bool ratio_norm)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_impl,
    _loss_fake,
)
_backward_op = register(
    f"policy_loss_backward({SHARED}, Tensor grad_loss, Tensor step_scale, Tensor pull_scale, Tensor? pull,"
    " Tensor? mean_output) -> (Tensor, Tensor)",
    _backward_impl,
    gradients_fake,
)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared_count: int, *arguments: Any) -> tuple[Tensor, ...]:
        # The outputs that are not differentiable would each be given a gradient of zeros.
        ctx.set_materialize_grads(False)
        shared, objective = arguments[:shared_count], Objective(*arguments[shared_count:])
        out = LossOutputs(*_loss_op(*shared, *objective))
        ctx.mark_non_differentiable(out.log_prob, out.ratio, out.metrics, out.has_grad)
        mean_output = objective.old_output if objective.ratio_norm else None
        save_shared(ctx, shared, out.step_scale, out.pull_scale, objective.reference_output, mean_output)
        return out.loss, out.log_prob, out.ratio, out.metrics, out.has_grad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor) -> tuple[Tensor | None, ...]:
        shared, terms = saved_shared(ctx)
        if grad is None:
            return (None,) * (1 + len(shared) + len(Objective._fields))
        grads = _backward_op(*shared, grad, *terms)
        return None, *shared_gradients(shared, grads), *(None,) * len(Objective._fields)


class _Linked(torch.autograd.Function):
    """The loss of arguments that need no check, linked to the model outputs alone.

    The other results go into `made`: each input and output of a function costs as much as an allocation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _quick.Loss,
        step: int | Tensor,
        kept: tuple[Tensor | None, ...],
        made: list[LossOutputs],
        model_output: Tensor,
        uncond_output: Tensor | None,
    ) -> Tensor:
        out = call.run()
        made.append(out)
        each, ctx.step = (step, 0) if isinstance(step, Tensor) else (None, step)
        ctx.scale = call.scale
        ctx.save_for_backward(model_output, uncond_output, call.rows, each, out.step_scale, out.pull_scale, *kept)
        return out.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, uncond, rows, each, step_scale, pull_scale, latents, next_latents, pull = ctx.saved_tensors
        shared = latents, output, next_latents, uncond, ctx.scale, rows, each, ctx.step, False, "auto"
        grads = _backward_op(*shared, grad, step_scale, pull_scale, pull, None)
        return *(None,) * 4, grads[0], None if uncond is None else grads[1]


def _linked(
    call: _quick.Loss,
    step: int | Tensor,
    kept: tuple[Tensor | None, ...],
    model_output: Tensor,
    uncond_output: Tensor | None,
) -> tuple[Tensor, LossOutputs]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (model_output, uncond_output)):
        made: list[LossOutputs] = []
        loss: Tensor = linked(_Linked, call, step, kept, made, model_output, uncond_output)
        return loss, made[0]
    out = call.run()
    return out.loss, out


def _clip_range(value: Any) -> tuple[float, float]:
    """How far below and above 1 a ratio is let."""
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    wanted = "a number of at least 0 or two of them, (below 1, above 1)"
    below = check_number("clip_range", low, 0.0, math.inf, wanted)
    return below, check_number("clip_range", high, 0.0, math.inf, wanted)


def _weights(
    weight: Any, table: TransitionTable, step: int | Tensor, latents: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """`[B]` in the compute dtype, None for 1; refuses rows without noise where their weight can be known."""
    if isinstance(weight, Tensor):
        check_per_sample("weight", weight, latents, (torch.float32, torch.float64))
        return weight.detach().to(dtype).contiguous()
    weight = check_number("weight", weight, wanted="a finite number or a tensor [B]")
    if weight != 0:
        if len(table.unscored) == len(table):
            raise ValueError("table: got one without noise, want a step with noise, or weight 0")
        # Compared one by one: another step must not compile again.
        if not isinstance(step, Tensor) and any(step == row for row in table.unscored):
            raise ValueError(f"step: got {step}, a row without noise, want one with noise, or weight 0")
    return None if weight == 1 else torch.full((len(latents),), weight, dtype=dtype, device=latents.device)


def policy_loss(
    latents: Tensor,
    model_output: Tensor,
    next_latents: Tensor,
    table: TransitionTable,
    step: int | Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
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
    A term whose weight is 0 is exactly 0 in loss and gradient, whatever the values it is made of.

    Args:
        latents, model_output, next_latents: `[B, ...]`, any float dtypes and strides.
        table, step: as for `transition_step`; `step` may differ per sample. A row without noise has no ratio: it is
            legal with weight 0 only. On a GPU, where per-sample steps and weights cannot be looked at without waiting,
            such a sample makes the loss NaN, as an index outside the table does.
        old_log_prob: float32 `[B]` (or float64), from sampling.
        advantages: float32 `[B]` (or float64); limited to +-`advantage_clip` (`inf` for no limit), and counted.
        clip_range: `c` above, or `(low, high)` for a clip to `[1 - low, 1 + high]` (DAPO's clip-higher, arXiv
            2503.14476).
        uncond_output, guidance_scale: classifier-free guidance, combined in the kernel.
        reference_output, kl_weight: adds `kl_weight` times the KL to the step of a reference model, whose (guided)
            output at the same latents is `reference_output`; with weight 0 it is a metric only. The KL is that of the
            step, `b^2 mean((v - v_ref)^2) / (2 tau^2)`. Flow-GRPO divides by the variance without its step size
            `-dt`: its `beta` is `kl_weight = beta (-dt)` here.
        ratio_norm, old_output: GRPO-Guard's RatioNorm (arXiv 2510.22319) needs the (guided) model output of the
            rollout; the policy term is divided by the flow's step size. Its ratios lie closer to 1: it is used with a
            `clip_range` of 2e-6 to 4e-6.
        weight: a number or `[B]` float32; 0 leaves a sample out of loss, gradient and metrics.
        rounding, backend: as for `transition_step`.

    Returns:
        `PolicyLoss(loss, log_prob, ratio, metrics, has_grad)`: scalar, `[B]`, `[B]`, `PolicyMetrics`, bool `[B]`.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or range, or a row without noise whose weight
            is not 0.
    """
    if ratio_norm is False and old_output is None:
        quick = _quick.policy_loss(
            *(latents, model_output, next_latents, table, step, old_log_prob, advantages, clip_range, advantage_clip),
            *(uncond_output, guidance_scale, reference_output, kl_weight, weight, rounding, backend),
        )
        if quick is not None:
            kept = (latents, next_latents, reference_output)
            loss, out = _linked(quick, step, kept, model_output, uncond_output)
            return PolicyLoss(loss, out.log_prob, out.ratio, PolicyMetrics(out.metrics), out.has_grad)
    shared = check_scoring(
        latents, model_output, next_latents, table, step, uncond_output, guidance_scale, rounding, backend
    )
    dtype = shared[5].dtype
    floats = (torch.float32, torch.float64)
    check_per_sample("old_log_prob", old_log_prob, latents, floats)
    check_per_sample("advantages", advantages, latents, floats)
    check_optional("reference_output", reference_output, latents)
    check_optional("old_output", old_output, latents)
    penalty = check_level("kl_weight", kl_weight)
    if penalty > 0 and reference_output is None:
        raise ValueError(f"reference_output: got None with kl_weight {kl_weight}, want the reference model's output")
    check_bool("ratio_norm", ratio_norm)
    if ratio_norm and old_output is None:
        raise ValueError("old_output: got None with ratio_norm, want the model output of the rollout")
    if ratio_norm and not table.has_step_size:
        raise ValueError("table: got one without flow step sizes with ratio_norm, want a flow sampler")
    loss, log_prob, ratio, metrics, has_grad = linked(
        _PolicyLoss,
        len(shared),
        *shared,
        old_log_prob.detach().to(dtype).contiguous(),
        advantages.detach().to(dtype).contiguous(),
        _weights(weight, table, step, latents, dtype),
        None if reference_output is None else reference_output.detach(),
        None if old_output is None else old_output.detach(),
        *_clip_range(clip_range),
        check_number("advantage_clip", advantage_clip, 0.0, math.inf, "a number of at least 0"),
        penalty,
        ratio_norm,
    )
    return PolicyLoss(loss, log_prob, ratio, PolicyMetrics(metrics), has_grad)
