"""Norm and modulation by Triton: one launch forward, one or two backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.common.modulation import token_sum
from ..kernels.norm_modulate import triton_kernels as kernels
from ._block import empty_unless, summed
from ._launch import launch_on, planned
from ._norm_modulate import Given, Outputs
from ._triton_gated_residual import BLOCK, Chunks, rows_of, sums_tokens, together, type_of

# Rows longer than this leave the backward no registers for more than what it must hold.
LONG = 4096
# Bytes of the next token that the backward may fetch meanwhile: shared memory of the smallest architecture.
FETCHED = 96 * 1024
# Blocks of a row that a forward's program holds at most, of 8 elements a thread.
PIECES = 5
# Registers of its threads at most: the assembler else spills a few to fit one program more.
REGISTERS = 128
# Gradients that the kernel adds.
MAX_GRADS = 5


def _types(like: Tensor, y: torch.dtype | None, given: Given) -> dict[str, Any]:
    """What values are rounded to on their way; float32 leaves them as they are."""
    names = ("gated_type", "norm_type", "scale_type", "product_type", "sum_type", "grad_type")
    if given.mode == "fast":
        return dict.fromkeys(names, tl.float32)
    gate, scale, shift = given[:3]
    norm = (given.norm_dtype or like.dtype,)
    product = norm if scale is None else (*norm, scale.dtype)
    total = product if shift is None else (*product, shift.dtype)
    gated = (like.dtype,) if gate is None or y is None else (y, gate.dtype)
    added = (like.dtype,) if scale is None else (scale.dtype,)
    kinds = (gated, norm, added, product, total, (like.dtype,))
    return {name: type_of(name.replace("_", " "), *kind) for name, kind in zip(names, kinds, strict=True)}


def _settings(channels: int, block: int, split: int, warps: int) -> dict[str, Any]:
    return {
        "segmented": split >= 0,
        # Of what Triton knows of a stride.
        "whole": channels % 16 == 0,
        "block": block,
        "num_warps": max(1, warps),
    }


def row_of(channels: int, mode: str) -> tuple[int, int, int]:
    """Channels of a forward's block, its warps, and the blocks of a row."""
    piece = BLOCK if channels <= PIECES * BLOCK else 2 * BLOCK
    pieces = -(-channels // piece)
    # The order of a row's sums follows from this; "lossless" keeps the one that it has always had.
    if mode == "lossless" or channels % 16 or not 1 < pieces <= PIECES:
        block = triton.next_power_of_2(channels)
        # 16 elements a thread.
        return block, min(16, block // 512), 1
    return piece, piece // 256, pieces


@planned
def forward(x: Tensor, y: Tensor | None, given: Given, outputs: Outputs) -> None:
    """Writes the residual stream (where y is given), the modulated tokens, and mean and reciprocal deviation."""
    batch, tokens, channels = x.shape
    h, out, mean, rstd = outputs
    operands = (x, y, *given[:5], None if y is None else h, out)
    statistics = (mean if given.norm == "layer" else None, rstd)
    block, warps, pieces = row_of(channels, given.mode)
    # What a loop over tokens holds beside a row of one block leaves a multiprocessor one program less.
    single = pieces == 1
    length = 1 if single else together(batch * tokens)
    parts = -(-tokens // length)
    sizes = (tokens, channels, given.split, parts, length)
    arguments = (*map(rows_of, operands), *statistics, *sizes, given.eps)
    types = _types(x, None if y is None else y.dtype, given)
    del types["grad_type"]
    settings = _settings(channels, block, given.split, warps) | types
    settings |= {"pieces": pieces, "single": single}
    if pieces > 1 and torch.version.hip is None:
        settings["maxnreg"] = REGISTERS
    settings["fused"] = given.mode == "fast" and given.scale is not None and given.shift is not None
    launch_on(x.device, kernels.forward_kernel, batch * parts, arguments, settings)


def _room(block: int, itemsize: int) -> int:
    """Sums that fit the registers beside a row."""
    return (1 if block > LONG else 2) if itemsize > 2 else 3 if block > LONG else 5


def _launches(outputs: Sequence[Tensor | None], one: bool) -> list[list[Tensor | None]]:
    """The outputs of each launch: all in one, or first those that are a norm's gradient."""
    *first, y_bias = (*outputs[:3], outputs[7])
    if one or all(t is None for t in (*first, y_bias)):
        return [list(outputs)]
    return [[*first, *[None] * 4, y_bias], [*[None] * 3, *outputs[3:7], None]]


@planned
def backward(
    grad_h: Tensor | None,
    grads: Sequence[Tensor],
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    given: Given,
    outputs: Sequence[Tensor | None],
) -> None:
    """Writes the gradients that are asked for: of x, y, gate, scale, shift, weight, bias and y's bias.

    The last is torch's sum of dy in "lossless", whose bits are eager's, and where it would take a launch more, which
    reads more than that sum does.
    """
    if all(t is None for t in outputs):
        return
    _, tokens, channels = h.shape
    gate, scale, shift, weight, bias, split, *_ = given
    _, dy, dgate, dscale, dshift, *vectors = outputs
    grads = list(grads)
    if len(grads) > MAX_GRADS:
        grads = [*grads[: MAX_GRADS - 1], summed(grads[MAX_GRADS - 1 :])]
    sums = [
        output is not None and sums_tokens(parameter, tokens, split)
        for parameter, output in ((gate, dgate), (scale, dscale), (shift, dshift))
    ]
    own = [t if keep else None for t, keep in zip((dgate, dscale, dshift), sums, strict=True)]
    row = triton.next_power_of_2(channels)
    y_bias = outputs[7]
    gated = None if dy is None and y_bias is None else gate
    sizes = [t.element_size() for t in (*grads, h, y, grad_h, scale, gated, weight, bias) if t is not None]
    y_dtype = y.dtype if y is not None else None if dy is None else dy.dtype
    types = _types(h, y_dtype, given)
    count, room = sum(t is not None for t in (*own, *vectors)), _room(row, max(sizes))
    apart = given.mode == "lossless" or count == room + 1
    if y_bias is not None and apart:
        dy = empty_unless(True, h) if dy is None else dy
        outputs, vectors, count = [outputs[0], dy, *outputs[2:7], None], [*vectors[:2], None], count - 1
    chunks = Chunks(h, split, own, vectors)
    for part in _launches(outputs, count <= room):
        # What is not a norm's gradient needs no whole row.
        block = row if any(t is not None for t in (*part[:3], part[7])) else min(row, BLOCK)
        ahead = chunks.length > 1 and block <= LONG and block * sum(sizes) <= FETCHED
        # 8 elements a thread; more where there are no sums, or where what every thread needs anyway takes too much.
        warps = block // 256 if chunks.sums and block <= LONG else min(8, block // 256)
        names = ("sums_gate", "sums_scale", "sums_shift")
        settings = {
            **_settings(channels, block, split, warps),
            **types,
            **{name: kept and t is not None for name, kept, t in zip(names, sums, part[2:5], strict=True)},
            "stages": 2 if ahead else 1,
        }
        arguments = (
            rows_of(grad_h),
            tuple(rows_of(g) for g in grads),
            *(rows_of(h), mean if given.norm == "layer" else None, rstd),
            *map(rows_of, (y, gated, scale, weight, bias)),
            *map(chunks.target, part),
            *chunks.sizes,
        )
        programs = chunks.batch * chunks.count * -(-channels // block)
        launch_on(h.device, kernels.backward_kernel, programs, arguments, settings)
    chunks.finish()
    if y_bias is not None and dy is not None and apart:
        y_bias.copy_(token_sum(dy))
