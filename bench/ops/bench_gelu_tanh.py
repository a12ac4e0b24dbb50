"""GELU of a feed-forward, and of a single-stream block, where attention's result stands before it."""

from typing import Any

import pytest
from torch import Tensor

from bench.place import Place
from bench.turns import Contest
from dancegrpo_fast.ops import gelu_tanh as op

from . import block_peers as peers
from .block_inputs import BF16, FLUX, HUNYUAN, Case, Parts, Run, Shapes, contest_of, generate, rows

PLAIN, BEHIND = "plain", "behind attention"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Models that have it."""
    generate(metafunc, *((form, model) for model in (HUNYUAN, FLUX) for form in (PLAIN, BEHIND)))


def test_gelu_tanh(case: Case, place: Place, contest: Any) -> None:
    """The image's tokens, or all."""
    contest(lambda: _gelu(case, place))


def _gelu(case: Case, place: Place) -> Contest:
    sizes, behind = case.sizes(place), case.form == BEHIND
    tokens = sizes.image + sizes.text if behind else sizes.image

    def ours(mode: str, backend: str) -> Run:
        def call(x: Tensor, attended: Tensor | None = None) -> tuple[Tensor, ...]:
            return (op.gelu_tanh(x, prefix=attended, mode=mode, backend=backend),)

        return call

    shapes: Shapes = [((1, tokens, 4 * sizes.channels), BF16), *(rows(sizes, tokens) if behind else [])]
    cost = op.cost(tokens, 4 * sizes.channels, 2, prefix=sizes.channels if behind else 0)
    peer = peers.gelu_behind if behind else peers.gelu_tanh
    return contest_of("gelu_tanh", case, place, Parts(shapes, peer, ours, cost, tokens))
