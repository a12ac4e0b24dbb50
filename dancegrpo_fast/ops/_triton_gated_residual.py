"""The gated residual by Triton, and what the ops over tokens share: rows, chunks of tokens, sums over them."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.common import triton_rows
from ..kernels.gated_residual import triton_kernels as kernels
from ._launch import launch_on, planned

# At most so many chunks of a sample's tokens: a few for each multiprocessor, their sums a few percent of what is moved.
CHUNKS, SHORTEST_CHUNK = 512, 4
# Channels a program where a row need not be seen as a whole: 8 a thread, a 16-byte access.
BLOCK, WARPS = 1024, 4
# Tokens of a forward's program, where that leaves so many programs: addresses and parameters are found once for all.
TOGETHER, PROGRAMS = 4, 1024
# Partial sums that one program reads at once.
LANES, SUM_BLOCK, SUM_WARPS = 128, 32, 4
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def type_of(name: str, *dtypes: torch.dtype) -> Any:
    """What torch promotes these dtypes to, for a kernel.

    Raises:
        ValueError: it is float64.
    """
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    if dtype not in TYPES:
        raise ValueError(f'{name}: got {dtype}, which backend "triton" does not compute in; want "reference"')
    return TYPES[dtype]


def rows_of(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A `[B, rows, C]` or `[C]` tensor as the kernels read it; what has one row repeats it."""
    if tensor is None:
        return None
    strides = [s if size > 1 else 0 for size, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
    strides = strides or [0, 0]
    step = tensor.stride(-1)
    return (tensor, *strides) if step == 1 or tensor.shape[-1] == 1 else (tensor, *strides, step)


def together(tokens: int) -> int:
    """Tokens of a forward's program, which has no sums over them."""
    return max(1, min(TOGETHER, tokens // PROGRAMS))


def sums_tokens(parameter: Tensor | None, tokens: int, split: int) -> bool:
    """Whether a parameter's gradient is a sum over tokens."""
    return parameter is not None and (split >= 0 or parameter.shape[1] != tokens)


class Chunks:
    """Chunks of tokens, and room for their sums; where they end depends on the number of tokens alone."""

    def __init__(
        self, like: Tensor, split: int, sample_sums: Sequence[Tensor | None], batch_sums: Sequence[Tensor | None]
    ):
        self.batch, self.tokens, self.channels = like.shape
        self.segmented, self.split = split >= 0, max(split, 0)
        self._samples = [t for t in sample_sums if t is not None]
        self._batch = [t for t in batch_sums if t is not None]
        outputs = [*self._samples, *self._batch]
        # Without sums nothing is shared by a chunk's tokens.
        self.length = max(SHORTEST_CHUNK, -(-self.tokens // CHUNKS)) if outputs else 1
        self.before = -(-self.split // self.length)
        self.count = self.before - (-(self.tokens - self.split) // self.length)
        shape = (len(outputs), self.batch, self.count, self.channels)
        self._room = torch.empty(shape, dtype=torch.float32, device=like.device) if outputs else None
        self._slots = {id(t): i for i, t in enumerate(outputs)}

    def target(self, output: Tensor | None) -> tuple[Any, ...] | None:
        """Where the first launch writes: the partial sums of a summed gradient, else the gradient itself."""
        if output is not None and self._room is not None and id(output) in self._slots:
            return rows_of(self._room[self._slots[id(output)]])
        return rows_of(output)

    @property
    def sums(self) -> int:
        """How many gradients are sums over tokens."""
        return len(self._slots)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What a kernel needs to find its tokens."""
        return self.tokens, self.channels, self.split, self.count, self.length

    def finish(self) -> None:
        """Adds the partial sums of all gradients, in one launch."""
        if self._room is None:
            return
        outputs = tuple(rows_of(t) for t in (*self._samples, *self._batch))
        rows = len(self._samples) * self.batch * (2 if self.segmented else 1) + len(self._batch)
        programs = rows * -(-self.channels // SUM_BLOCK)
        arguments = (self._room, outputs, self.batch, self.channels, self.count, self.before)
        settings = {
            "segmented": self.segmented,
            "whole_batch": len(self._batch),
            "lanes": LANES,
            "block": SUM_BLOCK,
            "num_warps": SUM_WARPS,
        }
        launch_on(self._room.device, triton_rows.sum_chunks_kernel, programs, arguments, settings)


def _settings(channels: int, split: int, product_type: Any) -> tuple[int, dict[str, Any]]:
    block = min(triton.next_power_of_2(channels), BLOCK)
    return -(-channels // block), {
        "segmented": split >= 0,
        "product_type": product_type,
        "block": block,
        "num_warps": max(1, WARPS * block // BLOCK),
    }


def _product_type(mode: str, y: torch.dtype, gate: Tensor) -> Any:
    return tl.float32 if mode == "fast" else type_of("gate y", y, gate.dtype)


@planned
def forward(x: Tensor, y: Tensor, gate: Tensor, split: int, mode: str, out: Tensor) -> None:
    """Writes `x + gate y`."""
    batch, tokens, channels = x.shape
    blocks, settings = _settings(channels, split, _product_type(mode, y.dtype, gate))
    settings |= {"one_row": split < 0 and gate.shape[1] == 1, "fused": mode == "fast"}
    length = together(batch * tokens)
    parts = -(-tokens // length)
    arguments = (rows_of(x), rows_of(y), rows_of(gate), rows_of(out), tokens, channels, split, parts, length)
    launch_on(x.device, kernels.forward_kernel, batch * parts * blocks, arguments, settings)


@planned
def backward(
    grad: Tensor, y: Tensor | None, gate: Tensor, split: int, mode: str, outputs: Sequence[Tensor | None]
) -> None:
    """Writes the gradients of y, of the gate, and of y's bias that are asked for."""
    grad_y, grad_gate, grad_bias = outputs
    if all(t is None for t in outputs):
        return
    sums = grad_gate is not None and sums_tokens(gate, grad.shape[1], split)
    chunks = Chunks(grad, split, [grad_gate if sums else None], [grad_bias])
    blocks, settings = _settings(grad.shape[2], split, _product_type(mode, (grad if y is None else y).dtype, gate))
    operands = rows_of(grad), rows_of(y), rows_of(gate), rows_of(grad_y)
    arguments = (*operands, chunks.target(grad_gate), chunks.target(grad_bias), *chunks.sizes)
    programs = chunks.batch * chunks.count * blocks
    settings |= {"sums_gate": sums}
    launch_on(grad.device, kernels.backward_kernel, programs, arguments, settings)
    chunks.finish()
