"""The programs of the gate's stages on CPU tensors: every case of a model, and nothing of ours that is wrong."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import expectations, first_calls, smoke
from bench.gpu.scalars import AS_IT_IS, NEITHER, ROUNDED, _rounding, scalar_orders
from bench.rows import Rows, read

from ..processes import LIMIT

ROOT = Path(__file__).parents[2]
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


def rows_of(out: Path, module: str, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", module, "--device", "dry", "--out", str(out), *options]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return read(out)


@needs_diffusers
def test_block_rows(tmp_path: Path) -> None:
    """Every contender of every HunyuanVideo case, each way."""
    rows = rows_of(tmp_path / "rows", "bench.gpu.blocks", "--rounds", "1", "--only", expectations.BLOCK_MODEL)
    assert {row["model"] for row in rows} == {expectations.BLOCK_MODEL}
    found = {(row["op"], row["form"]) for row in rows}
    assert found == {*expectations.BLOCK_FORMS, ("blocks", "double, single")}
    for form in found:
        mine = [row for row in rows if (row["op"], row["form"]) == form]
        names = {"eager", "compile", "ours, lossless", "ours, fast"}
        if form[0] == "blocks":
            assert all("no mask" in row["attention"] and {"peak_bytes", "saved_bytes"} <= set(row) for row in mine)
            names = {"eager", "compile", *(f"patched, {how}" for how in ("lossless", "fast", "fast, recompute all"))}
        pairs = [(row["backend"], row["pass"]) for row in mine]
        assert sorted(pairs) == sorted((name, p) for name in names for p in ("forward", "forward + backward"))
        ours = [row for row in mine if row["backend"].startswith(("ours", "patched"))]
        assert all(row["within_budget"] and row["source"] == "measured" for row in ours)


@needs_diffusers
def test_memory_rows(tmp_path: Path) -> None:
    """With and without block ops; on a CPU what is traced is what runs, and one backend attends."""
    only = "FLUX.*flash, full|Stable Diffusion.*flash, none|HunyuanVideo.*lossless|decode, Hunyuan|native, |flash, mask"
    rows = rows_of(tmp_path / "rows", "bench.gpu.memory", "--only", only)
    models = [row for row in rows if row["op"] == "memory"]
    assert len({row["model"] for row in models}) == 3 and {row["policy"] for row in models} == {"none", "full"}
    assert all(row["saved_off"] == 0 and row["measured_peak_bytes"] > row["measured_saved_bytes"] for row in models)
    assert all(row["peak_off"] == 0 for row in models if row["patch"] == "off")
    (decode,) = [row for row in rows if row["op"] == "decode memory"]
    assert decode["peak_off"] == 0 and decode["measured_peak_bytes"] > 0
    backends = {(row["attention"], row["masked"]): row for row in rows if row["op"] == "attention memory"}
    assert all(row["kernels"] if row["runs"] else row["error"] for row in backends.values())
    assert backends["native", False]["runs"] and backends["native", True]["runs"]
    assert not backends["_native_flash", True]["runs"]
    verdicts = expectations.JUDGES["memory"](expectations.Evidence(rows, [], []))
    assert {v.claim for v in verdicts if "not measured" not in v.text} == {
        *("memory-peak", "memory-saved", "decode-peak", "masked-attention")
    }


def test_resumed_rows(tmp_path: Path) -> None:
    """Those of other programs stay, and a line that was cut off is none."""
    path = tmp_path / "rows"
    first = Rows(path, lambda row: row["op"] == "mine")
    first.add("a", [{"op": "mine", "value": 1}, {"op": "mine", "value": 2}])
    Rows(path, lambda row: row["op"] == "other").add("a", [{"op": "other"}])
    with path.open("a") as file:
        file.write('{"case": "b", "op": "mi')
    again = Rows(path, lambda row: row["op"] == "mine", resume=True)
    assert again.done == {"a"} and again.written == []
    again.add("b", [{"op": "mine", "value": 3}])
    assert [row.get("value") for row in read(path)] == [1, 2, None, 3]
    Rows(path, lambda row: row["op"] == "mine")
    assert [row["op"] for row in read(path)] == ["other"]


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

    rows = Rows(tmp_path / "rows", lambda row: True)
    assert first_calls.run_part("cuda", {"step": call, "other": lambda: "fine"}, rows, {}) == (error is None)
    first, second = read(tmp_path / "rows")
    assert first["passed"] == (error is None) and second["passed"]
    said = {AssertionError: "AssertionError: test_gpu_programs.py:", ValueError: "ValueError: no such thing"}
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
