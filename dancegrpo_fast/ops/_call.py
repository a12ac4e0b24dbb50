"""The arguments that all ops share, and which implementation takes them."""

import functools
import importlib
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .. import backends

# The first arguments of every registered op, in the order of `Transition`.
SHARED = (
    "Tensor latents, Tensor model_output, Tensor next_latents, Tensor? uncond_output, float guidance_scale,"
    " Tensor table, Tensor? step, SymInt step_index, bool reference_rounding, str backend"
)


class Transition(NamedTuple):
    """One denoising step of a batch: `[B, ...]` tensors, a packed table, and each sample's row of it."""

    latents: Tensor
    model_output: Tensor
    next_latents: Tensor
    uncond_output: Tensor | None
    guidance_scale: float
    table: Tensor
    step: Tensor | None
    step_index: int
    reference_rounding: bool
    backend: str

    @property
    def batch(self) -> int:
        """Samples."""
        return self.latents.shape[0]

    @property
    def numel(self) -> int:
        """Elements of one sample."""
        return self.latents.numel() // self.latents.shape[0]


class Noise(NamedTuple):
    """Standard normals `[B, ...]`, or the key of the kernel's own; neither where no row adds noise."""

    given: Tensor | None
    seed: int | None
    sample_ids: Tensor | None


class Objective(NamedTuple):
    """What the policy loss takes beside the step: `[B]` tensors in the table's dtype, contiguous, and settings.

    No weight is a weight of 1 for every sample.
    """

    old_log_prob: Tensor
    advantages: Tensor
    weight: Tensor | None
    reference_output: Tensor | None
    old_output: Tensor | None
    clip_low: float
    clip_high: float
    advantage_clip: float
    kl_weight: float
    ratio_norm: bool


class LossOutputs(NamedTuple):
    """Where the policy loss writes; the scales are the gradient's coefficients per sample, for a unit gradient."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    metrics: Tensor
    has_grad: Tensor
    step_scale: Tensor
    pull_scale: Tensor


class GradientTerms(NamedTuple):
    """`dv = grad_loss (step_scale (x' - mean) + pull_scale (v - pull))`; `mean_output` replaces v in the mean."""

    grad_loss: Tensor
    step_scale: Tensor
    pull_scale: Tensor
    pull: Tensor | None
    mean_output: Tensor | None


class Implementation(Protocol):
    """What a module that runs the ops offers; every function writes into the outputs it is given."""

    def sample(self, call: Transition, noise: Noise, log_prob: Tensor, denoised: Tensor | None) -> None: ...

    def log_prob(self, call: Transition, log_prob: Tensor) -> None: ...

    def log_prob_gradient(
        self, call: Transition, grad_log_prob: Tensor, grad_output: Tensor, grad_uncond: Tensor | None
    ) -> None: ...

    def policy_loss(self, call: Transition, objective: Objective, out: LossOutputs) -> None: ...

    def policy_loss_gradient(
        self, call: Transition, terms: GradientTerms, grad_output: Tensor, grad_uncond: Tensor | None
    ) -> None: ...


_MODULES = {"reference": "_reference", "cpu": "_native", "cuda": "_native", "triton": "_triton"}


@functools.cache
def _module(name: str) -> Implementation:
    return cast(Implementation, importlib.import_module(f".{name}", __package__))


def implementation(call: Transition) -> Implementation:
    """The module that runs this call."""
    return _module(_MODULES[backends.pick(call.backend, call.latents.device, call.table.dtype)])


def split(arguments: tuple[Any, ...]) -> tuple[Transition, tuple[Any, ...]]:
    """An op's arguments as the shared ones and its own; per-sample steps become contiguous."""
    count = len(Transition._fields)
    call = Transition(*arguments[:count])
    step = call.step
    if step is not None:
        if step.dtype != torch.int64 or step.shape != call.latents.shape[:1]:
            raise ValueError(f"step: got {step.dtype} of shape {tuple(step.shape)}, want one int64 for each sample")
        if not step.is_contiguous():
            call = call._replace(step=step.contiguous())
    return call, arguments[count:]


def brief(result: Any) -> str:
    """A named tuple of tensors by dtypes and shapes: a GPU would have to be waited for to show numbers."""

    def of(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{where}"

    fields = ", ".join(f"{name}={of(value)}" for name, value in result._asdict().items())
    return f"{type(result).__name__}({fields})"


def empty_gradients(model_output: Tensor, uncond_output: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Room for the gradients of both outputs, the second one where there is guidance."""
    return torch.empty_like(model_output), None if uncond_output is None else torch.empty_like(uncond_output)


def gradients_fake(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Shapes of a backward op's results."""
    call, _ = split(arguments)
    return empty_gradients(call.model_output, call.uncond_output)
