"""Modules in the place of those that launch Triton: they compute the reference, and a difference that is planted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import backends
from dancegrpo_fast.ops import _block, _norm_modulate, _qk_norm_rope, gated_residual

FORWARD = {
    "gated_residual": gated_residual._by_reference,
    "norm_modulate": lambda x, y, given: _norm_modulate._by_reference(x, y, *given),
    "qk_norm_rope": lambda streams, *settings: _qk_norm_rope._by_reference(*flat(streams), *settings),
}


def flat(streams: Any) -> list[Any]:
    """Both streams of an op's arguments."""
    return [
        *(t for stream in streams for t in stream[: _qk_norm_rope.STREAM]),
        *[None] * (_qk_norm_rope.STREAM * (2 - len(streams))),
    ]


def _rope_backward(query: Any, key: Any, rstds: Any, streams: Any, *settings: Any) -> list[Tensor | None]:
    wanted = [True] * _qk_norm_rope.GRADIENTS * len(streams)
    return _qk_norm_rope._backward_by_reference(query, key, *rstds, *flat(streams), *settings, wanted)


BACKWARD = {
    "gated_residual": lambda *arguments: gated_residual._backward_by_reference(*arguments, [True] * 3),
    "norm_modulate": lambda *rest: _norm_modulate._backward_by_reference(*rest[:-1], *rest[-1], [True] * 8),
    "qk_norm_rope": _rope_backward,
}


class Planted:
    """One op's launches; `plant` may change each output, given its place among them, and counts them."""

    def __init__(self, op: str, plant: Callable[[str, str, int, Tensor], None]):
        self.op, self.plant, self.launches = op, plant, {"forward": 0, "backward": 0}

    def _write(self, direction: str, found: Any, outputs: Any) -> None:
        self.launches[direction] += 1
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        for place, (value, output) in enumerate(zip(found, outputs, strict=False)):
            if output is not None and output.numel():
                output.copy_(value)
                self.plant(self.op, direction, place, output)

    def forward(self, *arguments: Any) -> None:
        self._write("forward", FORWARD[self.op](*arguments[:-1]), arguments[-1])

    def backward(self, *arguments: Any) -> None:
        self._write("backward", BACKWARD[self.op](*arguments[:-1]), arguments[-1])


def in_place_of_triton(
    patch: pytest.MonkeyPatch, plant: Callable[[str, str, int, Tensor], None] = lambda *unused: None
) -> dict[str, Planted]:
    """Puts them there: everything but the backend "reference" runs them, on a CPU too."""
    made = {op: Planted(op, plant) for op in FORWARD}
    patch.setattr(backends, "pick_block", lambda backend, *rest: "reference" if backend == "reference" else "triton")
    # GELU in "lossless" mode launches nothing.
    patch.setattr(_block, "_triton_module", lambda op: made.get(op, object()))
    return made


def off_by(delta: float, op: str, direction: str, place: int) -> Callable[[str, str, int, Tensor], None]:
    """Adds `delta` to the first and the last number of one output."""

    def plant(*found: Any) -> None:
        *where, output = found
        if where == [op, direction, place]:
            numbers = output.view(-1)
            numbers[[0, -1]] += torch.tensor(delta, dtype=output.dtype)

    return plant
