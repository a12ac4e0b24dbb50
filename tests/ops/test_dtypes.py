"""Conversions are exact: every 16-bit pattern when read, round to nearest even when written."""

import importlib

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import backends, transition_step
from dancegrpo_fast.transitions import TransitionTable

from .cases import BF16, F16, F32, F64, bits, builds

SIXTEEN = (BF16, F16)


@pytest.fixture(params=builds())
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    module = importlib.import_module(f"dancegrpo_fast.{request.param}")
    monkeypatch.setattr(backends, "cpu_module", lambda: module)
    return request.param


# `1 x + 0 v`; with `v = -0` the sign of a zero is kept.
COPY = TransitionTable.from_coefficients([1.0], 0.0, 0.0, p=1.0, q=0.0, kind="none")


def copied(values: Tensor, dtype: torch.dtype) -> Tensor:
    minus_zero = torch.full((), -0.0, dtype=F32).expand_as(values)
    return transition_step(values, minus_zero, COPY, 0, out_dtype=dtype, backend="cpu").latents


def assert_same_values(found: Tensor, wanted: Tensor) -> None:
    """Bit for bit, except that any NaN equals any NaN."""
    assert torch.equal(found.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert bits(found[number]) == bits(wanted[number])


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(4, -1)


def strided(values: Tensor) -> Tensor:
    """The element-by-element path of the kernels."""
    return torch.stack([values, values], dim=-1)[..., 0]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("out", [F32, F64, *SIXTEEN])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_all_patterns_are_converted_exactly(dtype: torch.dtype, out: torch.dtype, spread: bool, build: str) -> None:
    patterns = every_pattern(dtype)
    assert_same_values(copied(strided(patterns) if spread else patterns, out), patterns.to(out))


def hard_floats(dtype: torch.dtype) -> Tensor:
    """Every value of `dtype`, ties between neighbours, one float32 to either side, random patterns."""
    exact = every_pattern(dtype).flatten().float()
    exact = exact[exact.isfinite()].sort().values
    ties = (exact[:-1].double() + exact[1:].double()).div(2).float()
    points = torch.cat([exact, ties])
    around = [torch.nextafter(points, torch.tensor(end)) for end in (float("inf"), float("-inf"))]
    info = torch.finfo(dtype)
    overflow = torch.tensor([info.max * (1 + k * info.eps / 16) for k in range(-16, 17)], dtype=F64).float()
    g = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1_000_000,), generator=g).to(torch.int32).view(F32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45])
    return torch.cat([points, *around, overflow, -overflow, random, special])[None]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_rounding_is_torch_s(dtype: torch.dtype, spread: bool, build: str) -> None:
    values = hard_floats(dtype)
    assert_same_values(copied(values, F32), values)
    if not spread:
        assert_same_values(copied(values, dtype), values.to(dtype))
        return
    out = torch.zeros(*values.shape, 2, dtype=dtype)
    transition_step(values, torch.full_like(values, -0.0), COPY, 0, out=out[..., 0], backend="cpu")
    assert_same_values(out[..., 0], values.to(dtype))
    assert torch.equal(out[..., 1], torch.zeros_like(out[..., 1]))


@pytest.mark.parametrize("target", [F32, BF16, F16])
def test_rounding_of_doubles_is_torch_s(target: torch.dtype, build: str) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(1, 500_000, generator=g, dtype=F64) * torch.logspace(-50, 45, 500_000, dtype=F64)
    assert_same_values(copied(values, target), values.to(target))
