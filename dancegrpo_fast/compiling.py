"""`torch.compile` of a denoiser, so that rollout and replay run one graph with the same bits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activations.checkpointing import blocks_of
from .experts import each

# Of one function: of each block with block ops, of each width of a UNet's ResNets, with gradients and without.
GRAPHS = 1024
Outputs = tuple[Tensor, Tensor | None]


def check_compiler(what: str, device: torch.device) -> None:
    """Raises ValueError, which begins with `model.compile`, where a CPU's graphs cannot be compiled."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ValueError(
            f'model.compile: got "{what}" without a C++ compiler that works ({type(error).__name__}), want g++, '
            "clang++ or CXX set to one, or null"
        ) from error


@dataclass
class Compiled:
    """How a compiled denoiser is called.

    Another layout of an input or no gradients are another graph to torch.compile, whose fusions may round otherwise:
    inputs are laid out alike, and where it takes that, calls without gradients run the forward of those with gradients.

    Attributes:
        with_gradients: whether they do, and what it would keep for a backward is dropped.
        seconds: that the first calls took.
    """

    with_gradients: bool = False
    seconds: float = 0.0

    def __call__(
        self,
        predict: Callable[..., Outputs],
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Mapping[str, Tensor],
        *others: Any,
    ) -> Outputs:
        """`GeneratorModel.predict`."""
        inputs = _laid_out(latents), _laid_out(times), {name: _laid_out(value) for name, value in conditioning.items()}
        if torch.is_grad_enabled() or not self.with_gradients:
            return predict(denoiser, *inputs, *others)
        with torch.enable_grad():
            output, uncond = predict(denoiser, *inputs, *others)
        return output.detach(), None if uncond is None else uncond.detach()


def _laid_out(tensor: Tensor) -> Tensor:
    """A copy, whose strides and alignment do not tell where it came from."""
    return tensor.clone(memory_format=torch.contiguous_format)


def compile_denoiser(denoiser: nn.Module, what: str) -> None:
    """Has a denoiser compiled at its first calls, once for each size; the names of its weights stay.

    What cannot be compiled, or takes more than `GRAPHS` graphs, is an error then: torch would compute the rest without.

    Args:
        denoiser: one, or `Experts`, as rollout calls it.
        what: "blocks", those that diffusers checkpoints, each by itself, or "whole".
    """
    import torch._dynamo as dynamo
    from torch._inductor import config as inductor

    settings: Any = dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 16 * GRAPHS)
    settings.fail_on_recompile_limit_hit = True
    # Else the update's graphs are cut where DDP's buckets end, and the rollout's are not.
    settings.optimize_ddp = False
    # Nothing that rounds is chosen by its time.
    options = {"deterministic": True} if hasattr(inductor, "deterministic") else None
    for one in each(denoiser):
        for part in blocks_of(one) if what == "blocks" else [one]:
            part.compile(dynamic=False, options=options)
