"""Two denoisers that take turns along the steps (Wan 2.2 A14B), as one module."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The second one's part of a pipeline, in diffusers.
SECOND = "transformer_2"


class Experts(nn.Module):
    """Denoisers of one class, of which a call runs the one that it names.

    Args:
        parts: by their names in the pipeline; the first is for the noisiest steps.
        frozen: all but the first stay as they are.

    Attributes:
        trained: how many of them are trained, the first ones.
    """

    def __init__(self, parts: Mapping[str, nn.Module], *, frozen: bool) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.trained = 1 if frozen else len(parts)
        for one in each(self)[self.trained :]:
            one.requires_grad_(False)
        self._device: torch.device | None = None
        self._running = 0

    @property
    def config(self) -> Any:
        """Of the first one, in diffusers."""
        return each(self)[0].config

    def forward(self, *, expert: int, **inputs: Any) -> Any:
        """What denoiser `expert` makes of its inputs."""
        if self._device is not None and expert != self._running:
            self._change(expert)
        return each(self)[expert](**inputs)

    def take_turns(self, device: torch.device) -> None:
        """From now on the frozen weights of the one that runs are on the device, those of the others wait on the host.

        A change comes before a call, so that a backward finds its weights where its forward left them.
        """
        self._device = device
        self._change(self._running)
        self.to(device)

    def _change(self, expert: int) -> None:
        assert self._device is not None
        # First away, so that they are never there together.
        for number in (*(n for n in range(len(each(self))) if n != expert), expert):
            for *_, parameter in _frozen(each(self)[number]):
                _move(parameter, self._device if number == expert else torch.device("cpu"))
        self._running = expert

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        """By which torch moves modules: weights that wait stay where they are."""
        others = [one for number, one in enumerate(each(self)) if number != self._running]
        waiting = [] if self._device is None else [found for one in others for found in _frozen(one)]
        for module, name, _ in waiting:
            module._parameters[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            for module, name, parameter in waiting:
                module._parameters[name] = parameter
        return self


def _move(parameter: nn.Parameter, device: torch.device) -> None:
    parameter.data = parameter.data.to(device)


def _frozen(denoiser: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in denoiser.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                yield module, name, parameter


def named(denoiser: nn.Module, part: str = "") -> dict[str, nn.Module]:
    """The denoisers in what a model has for its denoiser, by their parts of the pipeline; one alone is `part`."""
    return dict(denoiser.named_children()) if isinstance(denoiser, Experts) else {part: denoiser}


def each(denoiser: nn.Module) -> list[nn.Module]:
    """The denoisers in what a model has for its denoiser."""
    return list(named(denoiser).values())


def trained(denoiser: nn.Module) -> list[nn.Module]:
    """Those of them that are trained."""
    return each(denoiser)[: denoiser.trained] if isinstance(denoiser, Experts) else [denoiser]
