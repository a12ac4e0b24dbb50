"""The norm with modulation for three consumers, and the same behind a gated residual."""

from functools import partial
from typing import Any

import pytest
from torch import Tensor

from bench.place import Place
from bench.turns import Contest
from dancegrpo_fast.ops import norm_modulate as op

from . import block_peers as peers
from .block_inputs import (
    F32,
    FLUX,
    HUNYUAN,
    WAN,
    Case,
    Parts,
    Run,
    contest_of,
    generate,
    parameters,
    rows,
    vectors,
)

CONSUMERS = 3
FORMS = {"test_norm_modulate": "3 consumers", "test_gated_residual_norm_modulate": "in a block"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model."""
    generate(metafunc, *((FORMS[metafunc.function.__name__], model) for model in (HUNYUAN, FLUX, WAN)))


def test_norm_modulate(case: Case, place: Place, contest: Any) -> None:
    """Before attention."""
    contest(lambda: _norm(case, place))


def test_gated_residual_norm_modulate(case: Case, place: Place, contest: Any) -> None:
    """Between attention and feed-forward."""
    contest(lambda: _gated_norm(case, place))


def _norm(case: Case, place: Place) -> Contest:
    sizes, wan = case.sizes(place), case.model == WAN
    tokens = sizes.image if wan else sizes.image + sizes.text
    peer = peers.norm_modulate_in_float if wan else peers.norm_modulate

    def ours(mode: str, backend: str) -> Run:
        settings: dict[str, Any] = {"mode": mode, "backend": backend, "norm_dtype": F32 if wan else None}
        return partial(op.norm_modulate_fanout, consumers=CONSUMERS, **settings)

    shapes = rows(sizes, tokens) + (parameters(sizes, 2, F32) if wan else parameters(sizes, 2))
    cost = op.cost(1, tokens, sizes.channels, 2, consumers=CONSUMERS)
    return contest_of("norm_modulate", case, place, Parts(shapes, peer(CONSUMERS), ours, cost, tokens))


def _gated_norm(case: Case, place: Place) -> Contest:
    sizes = case.sizes(place)
    tokens = sizes.image
    shapes = rows(sizes, tokens, 2) + parameters(sizes, 3)
    peer: peers.Peer = peers.gated_residual_norm_modulate

    def ours(mode: str, backend: str) -> Run:
        return partial(op.gated_residual_norm_modulate, mode=mode, backend=backend)

    def affine(mode: str, backend: str) -> Run:
        settings: dict[str, Any] = {"norm_dtype": F32, "mode": mode, "backend": backend}

        def call(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            return op.gated_residual_norm_modulate(x, y, gate, weight=weight, bias=bias, **settings)

        return call

    if case.model == WAN:
        peer, ours = peers.gated_residual_norm_in_float, affine
        shapes = rows(sizes, tokens, 2) + parameters(sizes, 1, F32) + vectors(sizes.channels, 2)
    cost = op.cost(1, tokens, sizes.channels, 2, gated=True)
    return contest_of("gated_residual_norm_modulate", case, place, Parts(shapes, peer, ours, cost, tokens))
