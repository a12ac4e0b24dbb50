"""A row's sum is added in an order that its length and dtype decide: not strides, offsets or the number of samples.

The order follows from how the row lies in threads, which is compiled for what Triton knows of each operand.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dancegrpo_fast import backends
from dancegrpo_fast.ops import _triton_norm_modulate as norm_launcher
from dancegrpo_fast.ops import _triton_qk_norm_rope as rope_launcher
from dancegrpo_fast.ops._qk_norm_rope import Stream

from ..ops.cases import BF16, F32
from ..release import release_but
from . import offline

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")

TOKENS, HEADS = 16, 3
PLACES: dict[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
    "offset": lambda shape, dtype: torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape),
    "odd rows": lambda shape, dtype: torch.empty(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1],
    "even rows": lambda shape, dtype: torch.empty(*shape[:-1], shape[-1] // 16 * 16 + 16, dtype=dtype)[
        ..., : shape[-1]
    ],
    "every other": lambda shape, dtype: torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
}
Place = Callable[[tuple[int, ...], torch.dtype], Tensor]


def plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def norm(place: Place, batch: int, channels: int, dtype: torch.dtype, gated: bool = False) -> None:
    def tokens(at: Place) -> Tensor:
        return at((batch, TOKENS, channels), dtype)

    y, gate = (tokens(place), place((batch, 1, channels), dtype)) if gated else (None, None)
    scale, shift = (place((batch, 1, channels), dtype) for _ in range(2))
    numbers = torch.empty(batch, TOKENS)
    outputs = tokens(plain), tokens(plain), numbers, numbers
    given = norm_launcher.Given(gate, scale, shift, None, None, -1, "layer", 1e-6, "lossless", None)
    norm_launcher.forward(tokens(place), y, given, outputs)


def norm_gradient(place: Place, batch: int, channels: int, dtype: torch.dtype) -> None:
    def tokens(at: Place) -> Tensor:
        return at((batch, TOKENS, channels), dtype)

    scale, shift = (place((batch, 1, channels), dtype) for _ in range(2))
    numbers = torch.empty(batch, TOKENS)
    outputs = [tokens(plain), None, None, torch.empty_like(scale), torch.empty_like(shift), None, None, None]
    given = norm_launcher.Given(None, scale, shift, None, None, -1, "layer", 1e-6, "lossless", None)
    norm_launcher.backward(tokens(place), [tokens(place)], tokens(place), numbers, numbers, None, given, outputs)


def rope(place: Place, batch: int, dim: int, dtype: torch.dtype, norm: str = "head", half: bool = False) -> None:
    heads = batch, TOKENS, HEADS, dim
    weight, table = torch.empty(dim * (HEADS if norm == "token" else 1), dtype=dtype), torch.empty(TOKENS, dim)
    stream = Stream(place(heads, dtype), place(heads, dtype), weight, weight, table, table)
    outputs = plain(heads, dtype), plain(heads, dtype), torch.empty(2, batch, TOKENS, 1 if norm == "token" else HEADS)
    rope_launcher.forward([stream], norm, 1e-6, "half" if half else "interleaved", "each", "lossless", outputs)


def rope_gradient(place: Place, batch: int, dim: int, dtype: torch.dtype) -> None:
    heads = batch, TOKENS, HEADS, dim
    weight, table = torch.empty(dim, dtype=dtype), torch.empty(TOKENS, dim)
    stream = Stream(place(heads, dtype), place(heads, dtype), weight, weight, table, table)
    rstds = (torch.empty(2, batch, TOKENS, HEADS),) * 2
    outputs = [plain(heads, dtype), plain(heads, dtype), torch.empty_like(weight), torch.empty_like(weight), None, None]
    given = place(heads, dtype), place(heads, dtype), rstds, [stream]
    rope_launcher.backward(*given, "head", 1e-6, "interleaved", "each", "lossless", outputs)


CALLS: dict[str, tuple[Callable[..., None], tuple[int, ...]]] = {
    "norm": (norm, (261, 1536)),
    "gated norm": (partial(norm, gated=True), (261, 1536)),
    "norm gradient": (norm_gradient, (72, 1536)),
    "heads": (rope, (10, 40, 128)),
    "heads by halves": (partial(rope, half=True), (40, 128)),
    "tokens": (partial(rope, norm="token"), (40, 128)),
    "heads gradient": (rope_gradient, (40, 128)),
}


def sums(folder: Path, run: Callable[..., None], *call: object) -> list[str]:
    return offline.launched(90, folder, run, *call)[0].sums


@pytest.mark.parametrize("name", release_but(("heads",), CALLS))
def test_where_operands_lie(name: str, tmp_path: Path) -> None:
    run, widths = CALLS[name]
    for width in widths:
        wanted = sums(tmp_path, run, plain, 3, width, BF16)
        assert wanted
        for place in PLACES:
            assert sums(tmp_path, run, PLACES[place], 3, width, BF16) == wanted, (width, place)
        assert sums(tmp_path, run, plain, 1, width, BF16) == wanted, (width, "one sample")


@pytest.mark.parametrize("width", [261, 1536])
def test_what_is_computed_again_without_its_gate(width: int, tmp_path: Path) -> None:
    for dtype in (BF16, F32):
        gated, alone = (sums(tmp_path, norm, plain, 2, width, dtype, way) for way in (True, False))
        assert gated == alone
