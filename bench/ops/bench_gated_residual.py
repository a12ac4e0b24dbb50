"""The gated residual at the end of a block."""

from typing import Any

import pytest
from torch import Tensor

from bench.place import Place
from bench.turns import Contest
from dancegrpo_fast.ops import gated_residual as op

from . import block_peers as peers
from .block_inputs import BF16, F32, FLUX, HUNYUAN, WAN, Case, Parts, Run, contest_of, generate, parameters, rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model."""
    generate(metafunc, *(("end of a block", model) for model in (HUNYUAN, FLUX, WAN)))


def test_gated_residual(case: Case, place: Place, contest: Any) -> None:
    """All tokens."""
    contest(lambda: _gated(case, place))


def _gated(case: Case, place: Place) -> Contest:
    sizes, wan = case.sizes(place), case.model == WAN
    tokens = sizes.image if wan else sizes.image + sizes.text

    def ours(mode: str, backend: str) -> Run:
        def call(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
            return (op.gated_residual(x, y, gate, mode=mode, backend=backend),)

        return call

    shapes = rows(sizes, tokens, 2) + parameters(sizes, 1, F32 if wan else BF16)
    peer = peers.gated_residual_in_float if wan else peers.gated_residual
    parts = Parts(shapes, peer, ours, op.cost(1, tokens, sizes.channels, 2), tokens)
    return contest_of("gated_residual", case, place, parts)
