"""What the gate's smoke asks, on CPU tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import expectations, first_calls, smoke
from bench.gpu.scalars import AS_IT_IS, NEITHER, ROUNDED, _rounding, scalar_orders
from bench.rows import read


def test_the_order_of_a_scalar_and_bfloat16() -> None:
    """Each answer is told from the others."""
    tensor = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    scalar = torch.tensor(0.7)
    for factor, said in ((scalar, AS_IT_IS), (scalar.bfloat16().float(), ROUNDED), (torch.tensor(0.8), NEITHER)):
        assert _rounding((tensor.float() * factor).bfloat16(), scalar, tensor) == said
    found = list(scalar_orders(torch.device("cpu")))
    assert len(found) == 4 and NEITHER not in {row["rounding"] for row in found}


@pytest.mark.parametrize("error", [AssertionError(), ValueError("no such thing"), None])
def test_a_first_call_that_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Any) -> None:
    def call() -> str:
        if error is not None:
            raise error
        return "all is well"

    rows = tmp_path / "rows"
    assert first_calls.run_part("cuda", {"step": call, "other": lambda: "fine"}, rows, {}) == (error is None)
    first, second = read(rows)
    assert first["passed"] == (error is None) and second["passed"]
    said = {AssertionError: "AssertionError: test_gpu_smoke.py:", ValueError: "ValueError: no such thing"}
    assert first["detail"].startswith(said.get(type(error), "all is well"))
    assert capsys.readouterr().out.startswith("good" if error is None else "BAD  cuda: step, ")


def test_every_op_has_a_first_call() -> None:
    """By both implementations, and what the gate expects of them is found by their names."""
    parts = first_calls.parts(dry=True)
    assert tuple(parts) == smoke.PARTS
    labels = [f"{part}: {check}" for part, every in parts.items() for check in every]
    assert len(labels) == len(set(labels)) and set(parts["cuda"]) == set(first_calls.OPS)
    rows = [{"op": "smoke", "case": label, "passed": True, "detail": ""} for label in labels]
    verdicts = expectations.JUDGES["smoke"](expectations.Evidence(rows, [], []))
    assert [verdict.met for verdict in verdicts] == [True, True, True, False]
    assert sum(int(verdict.text.split()[0]) for verdict in verdicts[:3]) == len(labels)
