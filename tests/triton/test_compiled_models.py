"""Every kernel variant that the patched small models of all families launch compiles with this process's Triton."""

import contextlib
import importlib
import itertools
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

import dancegrpo_fast as dgf
from dancegrpo_fast import backends
from dancegrpo_fast.ops import selfcheck

from ..ops.cases import BF16, F32
from ..patch import conftest
from ..patch.models import FAMILIES, TINY, run
from ..release import release_but
from . import offline

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")

# Compiled by calls of their own, in test_compiled.py.
POLICY_OPS = {("transition", f"{name}_kernel") for name in ("sample", "log_prob", "gradient")}
POLICY_OPS |= {("policy_loss", "policy_loss_kernel")}
BOTH_WAYS = itertools.product(
    ("norm_modulate", "gated_residual", "qk_norm_rope"), ("forward_kernel", "backward_kernel")
)
EVERY_MODEL = {*BOTH_WAYS, ("gelu_tanh", "forward_kernel"), ("common", "sum_chunks_kernel")}
EVERY_FAMILY = EVERY_MODEL | {
    ("gelu_tanh", "backward_kernel"),
    ("gelu_tanh", "gradients_kernel"),
    ("qk_norm_rope", "sum_kernel"),
}
# With everything trained, and with so little that most gradients are not wanted, as under adapters.
RUNS: tuple[tuple[tuple[str, ...], Any, str, dict[str, Any], bool], ...] = (
    (tuple(TINY), BF16, "lossless", {}, True),
    (tuple(TINY), BF16, "fast", {"recompute": "all", "gates_from_weights": True}, True),
    (FAMILIES, F32, "fast", {}, False),
)


def kernels() -> set[tuple[str, str]]:
    """All there are."""
    found = set()
    for room in (Path(dgf.__file__).parent / "kernels").iterdir():
        for module in pkgutil.iter_modules([str(room)]):
            if module.name.startswith("triton_"):
                here = vars(importlib.import_module(f"dancegrpo_fast.kernels.{room.name}.{module.name}"))
                made = {name: value for name, value in here.items() if name.endswith("_kernel")}
                found |= {(offline.op_of(value), name) for name, value in made.items()}
    return found


own_attention_backend = conftest.own_attention_backend


def test_every_kernel_is_expected_somewhere() -> None:
    assert kernels() == EVERY_FAMILY | POLICY_OPS


@pytest.mark.parametrize("name", release_but(("flux",), TINY))
def test_a_model_compiles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward without spills or double, and nothing of the family goes untried."""
    # Nothing writes the outputs: shapes, strides and dtypes are those of a GPU, and no launch depends on numbers.
    monkeypatch.setattr(backends, "pick_block", lambda *_: "triton")
    monkeypatch.setattr(selfcheck, "_first_call", lambda *_: True)
    with offline.compiling(90, tmp_path) as launches:
        for names, dtype, mode, options, trained in RUNS:
            if name in names:
                model = TINY[name].model(dtype)
                for key, parameter in model.named_parameters():
                    parameter.requires_grad_(trained or "to_q" in key or ".net." in key)
                dgf.accelerate(model, mode, **options)
                run(model, TINY[name].inputs(dtype))
    assert {(found.op, found.kernel) for found in launches} >= (EVERY_FAMILY if name in FAMILIES else EVERY_MODEL)
    for found in {launch.cubin: launch for launch in launches}.values():
        assert found.spilled == 0, f"{found.op}.{found.kernel}: {found.spilled} bytes of local memory"
        assert ".f64" not in found.ptx


def test_this_triton_is_asked_before_a_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `backends` asks of Triton without compiling, it answers: a driver's target, and the assembler's version."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    backends._triton_problem.cache_clear()
    with offline.compiling(90, tmp_path):
        assert backends._triton_problem(0) == ""
    backends._triton_problem.cache_clear()
    usable, detail = backends._triton()
    assert usable and triton.__version__ in detail
