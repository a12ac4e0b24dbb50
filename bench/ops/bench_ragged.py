"""One attention of HunyuanVideo for two prompts of unequal length: with the model's mask, and without.

"peer" is what diffusers' model hands to torch, padded tokens and a mask, in the kernel that takes one on every GPU, and
"masked" the same in torch's choice. "ours, ..." is what an accelerated model does
under that backend (`trim_text`): one call of a varlen kernel, or a call of a dense one for each sample, with the copies
that go before and behind. "equal" are two prompts as long as the padded text, whose tokens need neither.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.place import Place, place_of
from bench.rows import Row
from bench.turns import Contest, cross
from dancegrpo_fast.patch._pieces import Blocks
from dancegrpo_fast.patch._ragged import VARLEN, Ragged
from tests.tolerances import assert_within_budget

from .block_inputs import BF16, BOTH, FORWARD, HUNYUAN, SIZES, TINY

EFFICIENT, MASKED, EQUAL, OURS = "peer", "masked", "equal", "ours, "
# Of diffusers; those of packages may not be there. Torch's own two come first: a dense kernel and its varlen kernel.
BACKENDS = ("native", "_native_flash", "_native_cudnn", "flash", "_flash_varlen_3")
CONTENDERS = (EFFICIENT, MASKED, EQUAL, *(OURS + name for name in BACKENDS))
# Valid tokens of the text, of 256.
SHARES = (40, 200)


@dataclass(frozen=True)
class Case:
    """One way."""

    way: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{HUNYUAN}, {self.way}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Forward, and with its backward."""
    place = place_of(metafunc.config.getoption("--device"))
    cases = [pytest.param(Case(way), marks=pytest.mark.takes(5.0)) for way in (FORWARD, BOTH)]
    cross(metafunc, cases if place.gpu else [], CONTENDERS, "attention at this size is measured on a GPU")


def test_ragged(case: Case, place: Place, contest: Any) -> None:
    """Every way of it."""
    contest(lambda: _attentions(case, place))


Run = Callable[[int], tuple[Tensor, ...]]


def _attentions(case: Case, place: Place) -> Contest:
    sizes = replace(TINY, text=6) if place.dry else SIZES[HUNYUAN]
    tokens = sizes.image + sizes.text
    generator = torch.Generator(place.device).manual_seed(0)
    shape = (2, tokens, sizes.heads, sizes.head_dim)
    drawn = [torch.randn(shape, generator=generator, device=place.device, dtype=BF16) for _ in range(4)]
    leaves, grad = [t.requires_grad_() for t in drawn[:3]], drawn[3].flatten(2)
    query, key, value = leaves
    lengths = [sizes.image + max(1, sizes.text * share // 256) for share in SHARES]
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    ragged, there = Ragged.of(valid, place.device), valid.to(place.device)
    blocks = Blocks("fast", "gelu", True, False, "reference")

    def call_of(name: str) -> Run:
        told = name.removeprefix(OURS) if name.startswith(OURS) else "native"
        told = "_native_efficient" if name == EFFICIENT and not place.dry else told
        attn = SimpleNamespace(processor=SimpleNamespace(_attention_backend=told, _parallel_config=None))
        mask: Any = {EQUAL: None}.get(name, ragged if name.startswith(OURS) else there[:, None, None])

        def forward(i: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (blocks.attend(attn, query, key, value, mask),)

        def both(i: int) -> tuple[Tensor, ...]:
            out = blocks.attend(attn, query, key, value, mask)
            # What padding gives is nobody's.
            wanted = grad if name == EQUAL else grad * there[..., None]
            return (out.detach(), *torch.autograd.grad(out, leaves, wanted))

        return both if case.way == BOTH else forward

    calls = {name: call_of(name) for name in CONTENDERS}

    def check(name: str) -> None:
        rows = lengths if name != EQUAL else [tokens, tokens]
        found = calls[name](0)
        for i, length in enumerate(rows):
            exact, plain = (_alone(leaves, grad, i, length, dtype) for dtype in (torch.float32, BF16))
            for actual, true, other in zip(found, exact, plain, strict=False):
                assert_within_budget(actual[i].flatten(1)[:length], true.double(), other)

    def info(name: str) -> Row:
        row: Row = {"op": "ragged", "form": "attention", "model": HUNYUAN, "pass": case.way, "batch": 2}
        row |= {"tokens": tokens, "valid": lengths, "channels": sizes.channels, "output_dtype": "bfloat16"}
        return row | {"varlen": VARLEN.get(name.removeprefix(OURS), ("none",))[0] if name.startswith(OURS) else None}

    absent = tuple(OURS + name for name in BACKENDS if place.dry or name not in ("native", "_native_flash"))
    return Contest(calls, check, info, place.clock(1), may_fail=absent)


def _alone(leaves: list[Tensor], grad: Tensor, i: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and gradients `[S, H D]` of one sample's valid tokens."""
    given = [t.detach()[i : i + 1, :length].to(dtype).transpose(1, 2).requires_grad_() for t in leaves]
    query, key, value = given
    out = F.scaled_dot_product_attention(query, key, value)
    grads = torch.autograd.grad(
        out, given, grad[i, :length].to(dtype).view(1, length, *leaves[0].shape[2:]).transpose(1, 2)
    )
    return tuple(t.detach()[0].transpose(0, 1).flatten(1) for t in (out, *grads))
