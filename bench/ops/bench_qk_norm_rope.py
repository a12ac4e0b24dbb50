"""Norms of queries and keys with their rotation: of one stream, of two that become one, and over all heads (Wan)."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.place import Place
from bench.turns import Contest
from dancegrpo_fast.ops import qk_norm_rope as op

from . import block_peers as peers
from .block_inputs import BF16, F32, FLUX, HUNYUAN, WAN, Case, Parts, Run, Shapes, contest_of, generate, vectors

SINGLE, DOUBLE, OVER = "single stream", "double stream", "over tokens"
NORMS = {HUNYUAN: "head_twice", FLUX: "head", WAN: "token"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model."""
    generate(metafunc, *((form, model) for model in (HUNYUAN, FLUX) for form in (SINGLE, DOUBLE)), (OVER, WAN))


def test_qk_norm_rope(case: Case, place: Place, contest: Any) -> None:
    """The sequence of attention."""
    contest(lambda: _qk(case, place))


def tables(rows: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[rows, dim]` in float32, every angle twice."""
    speeds = 10_000.0 ** -torch.linspace(0, 1, dim // 2, device=device)
    angles = torch.outer(torch.arange(rows, device=device, dtype=F32), speeds).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _qk(case: Case, place: Place) -> Contest:
    model, joint, sizes = case.model, case.form == DOUBLE, case.sizes(place)
    image, text, heads, dim = sizes.image, sizes.text, sizes.heads, sizes.head_dim
    settings: dict[str, Any] = {"norm": NORMS[model], "eps": peers.EPS}
    cos, sin = tables(image + text if model == FLUX else image, dim, place.device)
    lengths = [image if model == WAN else image + text]
    if joint:
        lengths = [text, image] if model == FLUX else [image, text]
    # Each stream's part of the tables.
    parts: list[tuple[Tensor | None, Tensor | None]] = [(cos, sin)]
    if joint:
        parts = [(cos[:text], sin[:text]), (cos[text:], sin[text:])] if model == FLUX else [(cos, sin), (None, None)]
    if model == WAN:
        parts = [(cos[:, 0::2], sin[:, 1::2])]

    def ours(mode: str, backend: str) -> Run:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, weights = tensors[: 2 * len(lengths)], tensors[2 * len(lengths) :]
            streams = [
                op.Stream(given[2 * i], given[2 * i + 1], weights[2 * i], weights[2 * i + 1], *part)
                for i, part in enumerate(parts)
            ]
            query, key = op.qk_norm_rope(*streams, **settings, mode=mode, backend=backend)
            assert key is not None
            return query, key

        return call

    peer = {
        HUNYUAN: partial(peers.hunyuan_qk, cos, sin, joint),
        FLUX: partial(peers.flux_qk, cos, sin, joint),
        WAN: partial(peers.wan_qk, cos, sin),
    }[model]()
    shapes: Shapes = [((1, length, heads, dim), BF16) for length in lengths for _ in range(2)]
    shapes += vectors(heads * dim if model == WAN else dim, 2 * len(lengths))
    cost = op.cost(1, sum(lengths), heads, dim, 2)
    return contest_of("qk_norm_rope", case, place, Parts(shapes, peer, ours, cost, sum(lengths)))
