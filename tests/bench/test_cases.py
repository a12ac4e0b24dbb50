"""Every case of `bench/` on a few CPU elements: each contender runs, and nothing of ours is wrong."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import expectations
from bench.ops.bench_ragged import CONTENDERS

from .cases import ONCE, run_pytest

STEPS = ("step", "step_given_noise", "log_prob", "policy_loss")
RL, BLOCKS = ["ours, cuda", "ours, triton"], ["ours, lossless", "ours, fast"]
PATCHED = [f"patched, {how}" for how in ("lossless", "fast", "fast, recompute all")]
pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


def rows_of(out: Path, *options: str) -> list[dict[str, Any]]:
    done, rows = run_pytest(out, "--device", "dry", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(row["environment"]["dry"] for row in rows)
    return rows


@pytest.mark.parametrize("selection", ["not full", pytest.param("full", marks=pytest.mark.release)])
def test_every_case(tmp_path: Path, selection: str) -> None:
    rows = rows_of(tmp_path, "bench/ops", "-m", selection, *ONCE)
    assert all(row["within_budget"] for row in rows if row["backend"] not in ("eager", "compile"))
    contenders: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        contenders.setdefault((row["op"], row["case"]), []).append(row["backend"])
    blocks = dict(expectations.BLOCK_FORMS)
    assert {op for op, _ in contenders} == {
        *STEPS,
        *blocks,
        "blocks",
        "lora_linear",
        "ragged",
        *(("host", "shim") if selection != "full" else ()),
    }
    for (op, case), names in contenders.items():
        ours = PATCHED if op == "blocks" else BLOCKS if op in blocks or op == "lora_linear" else RL
        if op == "ragged":
            # Those of cuDNN and of packages may not run.
            assert names == [name for name in CONTENDERS if name in names] and set(CONTENDERS[:4]) <= set(names), case
        elif op != "host":
            assert names == (["peer", "ours", "run"] if op == "shim" else ["eager", "compile", *ours]), case
    if selection == "full":
        return
    host = {row["backend"]: row for row in rows if row["op"] == "host"}
    assert all("kernels" in row and "waits" in row for row in host.values())
    assert {f"cpu: {name.partition(': ')[2]}" for name in (expectations.STEP, expectations.OP)} <= set(host)
    timed = [row for row in rows if "pass" in row and row["op"] not in ("lora_linear", "ragged")]
    forms = {(row["op"], row["form"], row["pass"]) for row in timed}
    every = (*expectations.BLOCK_FORMS, ("blocks", "double, single"))
    assert forms == {(*form, way) for form in every for way in ("forward", "forward + backward")}
    assert {row["model"] for row in timed} == {expectations.BLOCK_MODEL}


FEW = "FLUX and flash and full or decode and Hunyuan or native or flash and mask"
OTHERS = f"not ({FEW})"


@pytest.mark.release
@pytest.mark.parametrize("selection", [FEW, OTHERS])
def test_memory_rows(tmp_path: Path, selection: str) -> None:
    """On a CPU what is traced is what runs, and one backend attends."""
    rows = rows_of(tmp_path, "bench/gpu/memory", "-k", selection)
    models = [row for row in rows if row["op"] == "memory"]
    assert all(row["saved_off"] == 0 and row["measured_peak_bytes"] > row["measured_saved_bytes"] for row in models)
    assert all(row["peak_off"] == 0 for row in models if row["patch"] == "off")
    decodes = [row for row in rows if row["op"] == "decode memory"]
    assert all(row["peak_off"] == 0 and row["measured_peak_bytes"] > 0 for row in decodes)
    backends = {(row["attention"], row["masked"]): row for row in rows if row["op"] == "attention memory"}
    assert all(row["kernels"] if row["runs"] else row["error"] for row in backends.values())
    if selection == FEW:
        assert backends["native", False]["runs"] and backends["native", True]["runs"]
        assert not backends["_native_flash", True]["runs"]
        judged = expectations.JUDGES["memory"](expectations.Evidence(rows, [], []))
        found = {v.claim for v in judged if "not measured" not in v.text}
        assert {"memory-peak", "memory-saved", "decode-peak"} <= found


@pytest.mark.release
def test_a_cpu_has_nothing_of_the_gpus(tmp_path: Path) -> None:
    """Such cases say why they are skipped."""
    done, _ = run_pytest(tmp_path, "bench/gpu", "bench/ops", "-k", "none")
    for reason in ("block ops are Triton's", "blocks are measured on a GPU", "GPU memory is measured on a GPU"):
        assert reason in done.stdout, done.stdout
