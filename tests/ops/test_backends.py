"""Which backend a call gets where Triton, torch or the machine is not what it takes."""

import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import dancegrpo_fast as dgf
from dancegrpo_fast import backends
from dancegrpo_fast.checks import shown
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_linear import gelu_linear
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import norm_modulate
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from .cases import TABLES

GPU = torch.device("cuda", 0)
REMEMBERED = (backends._triton, backends._triton_problem, backends._warn_of_left_out)


@pytest.fixture(autouse=True)
def a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the CUDA module, and with nothing remembered."""
    monkeypatch.setattr(backends, "_cuda", lambda: (None, "not built"))
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    for function in REMEMBERED:
        function.cache_clear()
    yield
    for function in REMEMBERED:
        function.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str | None, problem: Exception | None = None) -> None:
    """A Triton of this version that compiles, or does not."""

    class Driver:
        def get_current_target(self) -> str:
            if problem is not None:
                raise problem
            return "sm_90"

    package = ModuleType("triton")
    if version is not None:
        package.__version__ = version  # type: ignore[attr-defined]
    runtime = SimpleNamespace(driver=SimpleNamespace(active=Driver()))
    compiler = SimpleNamespace(make_backend=lambda target: SimpleNamespace(hash=lambda: target))
    for name, module in {"triton": package, "triton.runtime": runtime, "triton.compiler": compiler}.items():
        monkeypatch.setitem(sys.modules, name, module)


PICKS: tuple[Callable[..., str], ...] = (backends.pick, backends.pick_block)


def assert_left_out(reason: str) -> None:
    """Refused by name, and by "auto" with one warning."""
    for pick in PICKS:
        with pytest.raises(ValueError, match=rf'^backend: got "triton" .*{reason}.*; want "auto" or "reference"'):
            pick("triton", GPU, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=rf'^backend: "auto" leaves Triton out, .*{reason}') as caught:
        for pick in (*PICKS, *PICKS):
            assert pick("auto", GPU, torch.bfloat16) == "reference"
    assert len(caught) == 1


@pytest.mark.parametrize("version", ["3.3.1", "3.2.0", "2.10.0+git", "3.3.0.post19"])
def test_triton_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    assert_left_out(rf"Triton {version.replace('+', '.')} is too old, want 3\.4 or later")
    assert not backends.available()[2].available


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert_left_out(r"Triton is not installed, want 3\.4 or later")


def test_a_folder_named_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert_left_out(r"is another package")


def test_triton_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert_left_out("Triton does not load: libtriton.so: undefined symbol")


@pytest.mark.parametrize("version", ["3.4.0", "3.7.1", "3.10.0", "4.0.0", "99.1.0a0+git123", "main"])
def test_triton_new_enough_or_unknown(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pick in PICKS:
            assert pick("auto", GPU, torch.bfloat16) == pick("triton", GPU, torch.bfloat16) == "triton"
            assert pick("auto", GPU, torch.float64) == "reference"


@pytest.mark.parametrize(
    "problem", [RuntimeError("Failed to find C compiler"), FileNotFoundError("Cannot find ptxas")], ids=str
)
def test_triton_cannot_compile_on_this_machine(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    install(monkeypatch, "3.7.1", problem)
    assert_left_out(f"Triton cannot compile on this machine: {type(problem).__name__}: {problem}")


def test_a_device_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert_left_out(r"compute capability 7\.5, want 8\.0 or later")


def test_torch_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from dancegrpo_fast import ops

    for version in ("2.8.0", "2.8.0a0+nv25.6", "2.15.0+cpu", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        importlib.reload(ops)
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    with pytest.raises(ImportError, match=r"^torch: got 2\.7\.1\+cu126, want 2\.8 or later"):
        importlib.reload(ops)


X, ROW = torch.randn(2, 3, 8), torch.randn(2, 8)
HEADS = torch.randn(2, 3, 2, 8)
CALLS: dict[str, Callable[..., object]] = {
    "norm_modulate": lambda **k: norm_modulate(X, ROW, ROW, **k),
    "gated_residual": lambda **k: gated_residual(X, X, ROW, **k),
    "gelu_tanh": lambda **k: gelu_tanh(X, **k),
    "gelu_linear": lambda **k: gelu_linear(X, torch.randn(4, 8), None, **k),
    "qk_norm_rope": lambda **k: qk_norm_rope(Stream(HEADS, HEADS), **k),
    "transition_step": lambda **k: dgf.transition_step(X, X, TABLES["flow"], 1, seed=1, **k),
    "transition_log_prob": lambda **k: dgf.transition_log_prob(X, X, X, TABLES["flow"], 1, **k),
    "policy_loss": lambda **k: dgf.policy_loss(X, X, X, TABLES["flow"], 1, torch.zeros(2), torch.ones(2), **k),
    "pick": lambda backend: backends.pick(backend, X.device),
    "pick_block": lambda backend: backends.pick_block(backend, X.device, X.dtype),
}


@pytest.mark.parametrize("value", [None, 3, b"cpu", ["cpu"], torch.ones(2)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", CALLS)
def test_a_backend_that_is_no_string(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^backend: got {re.escape(shown(value))}, want one of \"auto\""):
        CALLS[name](backend=value)


@pytest.mark.parametrize("name", CALLS)
def test_those_calls_are_fine_otherwise(name: str) -> None:
    CALLS[name](backend="reference")
