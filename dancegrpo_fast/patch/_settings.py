"""What a patch is asked for, and the forwards that it puts into a model."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..ops._block import recomputed

RECOMPUTE = ("none", "gelu", "all")


@dataclass(frozen=True)
class Settings:
    """How the patched blocks compute, and which of their ops' outputs the backward computes again."""

    mode: str
    recompute: str
    trim_text: bool
    gates_from_weights: bool
    backend: str

    def unsaved(self, level: str, *outputs: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, these outputs are not kept for the backward if the setting says so."""
        wanted = self.recompute == "all" or (self.recompute == "gelu" and level == "gelu")
        return recomputed(*outputs) if wanted else contextlib.nullcontext()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that every block op takes."""
        return {"mode": self.mode, "backend": self.backend}


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """DataParallel's copy of a module: the forward is of the copy, not of the module that it was put into."""
    replica: nn.Module = type(self)._replicate_for_data_parallel(self)
    for name in PLACED:
        bound = vars(self)[name]
        if isinstance(bound, MethodType):
            vars(replica)[name] = MethodType(bound.__func__, replica)
    return replica


PLACED = ("forward", "_replicate_for_data_parallel")


class Accelerated:
    """The forwards put into a model, and how to take them out again. Calling it undoes the patch."""

    def __init__(self, transformer: nn.Module, replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]):
        self.transformer = transformer
        self._placed: list[tuple[nn.Module, MethodType]] = []
        prepared = list(replacements)
        for module, _ in prepared:
            forward = vars(module).get("forward", module.forward)
            # A file made by pickling an accelerated model has the class's own there.
            if getattr(forward, "__func__", None) is not type(module).forward:
                raise ValueError(
                    f"transformer: got a {type(module).__name__} whose forward is wrapped already, by a hook or another"
                    " patch; want it as diffusers made it (accelerate first, then add hooks)"
                )
        for module, function in prepared:
            method = MethodType(function, module)
            # On the instance: the class stays as it is.
            module.forward = method
            module._replicate_for_data_parallel = MethodType(_replicate_for_data_parallel, module)  # type: ignore[method-assign]  # on the instance
            self._placed.append((module, method))

    def __call__(self) -> None:
        """Restores every forward.

        Raises:
            RuntimeError: something wrapped one of them since; nothing is changed then.
        """
        for module, method in self._placed:
            if vars(module).get("forward") is not method:
                raise RuntimeError(
                    f"undo: the forward of a {type(module).__name__} was wrapped after accelerate(); remove that first"
                )
        for module, _ in self._placed:
            for name in PLACED:
                delattr(module, name)
        self._placed.clear()
