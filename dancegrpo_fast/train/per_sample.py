"""Gradients of LoRA layers, of every sample of a model call apart, from one backward of all of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import lora
from .calls import Inputs, Policy


class _Linear(torch.autograd.Function):
    """`x @ weight.T` for x `[batch, ..., in]`, whose backward hands `layer` what makes the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "_Layer") -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        ctx.layer.add(x, grad)
        return grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None, None, None


class _Layer:
    """A LoRA matrix: calls in place of its module's forward, and sums gradients."""

    def __init__(self, owner: "PerSample", module: nn.Linear) -> None:
        self._owner, self.module = owner, module
        self.sums: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = _Linear.apply(x, self.module.weight, self)
        return made

    def add(self, x: Tensor, grad: Tensor) -> None:
        owner, batch = self._owner, len(grad)
        if batch % owner.rows:
            raise ValueError(
                f'train.passes: got "reweight" for a layer that sees {batch} rows in a call of {owner.rows}, want 2'
            )
        # The halves of a guided batch follow one another.
        mine, theirs = (values.to(grad.dtype).reshape(batch, -1, values.shape[-1]) for values in (grad, x))
        each = (mine.transpose(1, 2) @ theirs).float().unflatten(0, (-1, owner.rows)).sum(dim=0)
        assert self.sums is not None
        self.sums.index_add_(0, owner.samples, each[: len(owner.samples)])


class PerSample:
    """Gives LoRA layers a forward whose backward sums gradients by sample, and none of its weights.

    A weight's gradient is the sum over tokens of its output's gradient times its input, and no sample's depends on
    another's output; so the sums of each sample are there in the backward of all (as in Goodfellow 2015,
    arxiv.org/abs/1510.01799).

    Args:
        denoiser: with its LoRA layers.
        parameters: all that are trained.
        rows: of a model call; a layer's batch is a multiple of them, row i of a call at places i, i + rows, ...

    Attributes:
        samples: int64 `[n]`, of the first n rows of the call.

    Raises:
        ValueError: a parameter that is no linear LoRA layer's.
    """

    def __init__(self, denoiser: nn.Module, parameters: Mapping[str, nn.Parameter], rows: int) -> None:
        parts = [one[lora.ADAPTER] for layer in lora.layers(denoiser).values() for one in (layer.lora_A, layer.lora_B)]
        self.rows, self._parameters = rows, parameters
        self._layers = {id(part.weight): _Layer(self, part) for part in parts if type(part) is nn.Linear}
        for name, parameter in parameters.items():
            if id(parameter) not in self._layers:
                raise ValueError(f'train.passes: got "reweight", and {name} is no linear LoRA layer\'s, want 2')
        self.samples = torch.empty(0, dtype=torch.int64)

    def start(self, count: int) -> None:
        """Sums for so many samples, of zeros; float32."""
        for layer in self._layers.values():
            weight = layer.module.weight
            layer.sums = torch.zeros(count, *weight.shape, dtype=torch.float32, device=weight.device)

    @contextmanager
    def of(self, samples: Tensor) -> Iterator[None]:
        """Around a model call of these (int64 `[n]`) and its backward."""
        self.samples = samples
        for layer in self._layers.values():
            layer.module.forward = layer  # type: ignore[method-assign, assignment]  # of this module alone
        try:
            yield
        finally:
            for layer in self._layers.values():
                del layer.module.forward

    def take(self) -> dict[str, Tensor]:
        """The sums `[count, ...]` by parameter; they are gone here."""
        found = {}
        for name, parameter in self._parameters.items():
            layer = self._layers[id(parameter)]
            assert layer.sums is not None
            found[name], layer.sums = layer.sums, None
        return found

    def check(self, policy: Policy, inputs: Inputs) -> None:
        """Tries one model call.

        Raises:
            ValueError: its layers see rows in another order, or something else than their modules calls them.
        """
        self.start(self.rows)
        with torch.enable_grad(), self.of(torch.arange(self.rows, device=inputs[0].device)):
            output, uncond = policy(policy.model.denoiser, *inputs)
            first = [values[0].float().sum() for values in (output, uncond) if values is not None]
            torch.stack(first).sum().backward()
        made = self.take()
        past = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        for parameter in self._parameters.values():
            parameter.grad = None
        if past:
            raise ValueError(
                f'train.passes: got "reweight", and the model does not call the module of {past[0]}, want 2'
            )
        mine, others = (any(bool(sums[part].any()) for sums in made.values()) for part in (slice(1), slice(1, None)))
        if others or not mine:
            raise ValueError('train.passes: got "reweight" for a model that mixes the rows of its calls, want 2')
