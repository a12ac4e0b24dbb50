"""Self checks of the kernels themselves, which pass, on slices that leave tokens out.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

import warnings
from typing import Any

import pytest
import torch

from dancegrpo_fast.ops import selfcheck

from ..gpu.test_block_ops import OPS, Draw, results
from ..ops import conftest
from ..ops.cases import BF16, F16, F32

NAMES = ("gated norm in segments", "gate per token", "rope without a norm")
CASES: list[Any] = [*((name, (BF16, BF16)) for name in NAMES)]
MORE = [
    ("norm", (BF16, BF16)),
    ("gate", (BF16, BF16)),
    ("rope of two streams", (BF16, BF16)),
    ("gated norm", (BF16, F32)),
]
MORE += [("rms norm with weights", (BF16, BF16)), ("rope over tokens", (BF16, BF16))]
MORE += [("norm", (F16, F16)), ("rope", (F32, F32)), ("rope of halves", (BF16, F32))]
CASES += [pytest.param(*case, marks=pytest.mark.release) for case in MORE]


nothing_known = conftest.nothing_known
pytestmark = pytest.mark.usefixtures("nothing_known")


@pytest.mark.parametrize(("name", "dtypes"), CASES, ids=str)
def test_kernels_pass(name: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "TOKENS", 3)
    shape, more = ((3, 5, 1), {"heads": (2, 16)}) if name.startswith("rope") else ((3, 5, 40), {})
    if "segments" in name:
        more["split"] = 3
    tokens = {"rows": 5} if "per token" in name else {}
    op = OPS[name](Draw(dtypes, 0), shape, **more, **tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*differs from eager torch")
        results(op, "lossless", "triton")
    found = selfcheck.records()
    assert {check.direction for check in found} == {"forward", "backward"} and all(check.passed for check in found)
    if name in ("gate per token", "rope without a norm"):
        assert all(check.equal and check.budget is None for check in found)


def test_kernels_fail_where_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once, where eager torch rounds twice."""
    from dancegrpo_fast.ops import _triton_gated_residual as launcher

    op = OPS["gate"](Draw((BF16, BF16), 0), (2, 7, 40))
    product = launcher._product_type
    monkeypatch.setattr(launcher, "_product_type", lambda mode, *rest: product("fast", *rest))
    with pytest.warns(RuntimeWarning, match="gated_residual forward on cpu, .*, want equal bits"):
        results(op, "lossless", "triton")
    assert [check.passed for check in selfcheck.records()] == [False, True]
