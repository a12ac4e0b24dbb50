"""The checks of `smoke`: a first call of each op, of one shape, against the CPU."""

import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast import gaussian_noise
from tests.gpu import test_block_ops, test_graphs, test_invariance, test_parity, test_streams
from tests.gpu.targets import Target, differing_bits, on
from tests.ops.cases import BF16, F32, TABLES, make_case, sample
from tests.ops.test_policy_loss import OPTIONS
from tests.tolerances import KERNELS_APART_ULPS, assert_same_noise

from ..rows import Row, add

TABLE = TABLES["flow"]
DTYPES = (F32, BF16, F32)
SHAPE = (3, 7, 2500)
STEPS = torch.tensor([3, 1, 0, 2, 2, 1, 1, 2, 1])
# A detail to print; raises AssertionError where it is not as it must be.
Check = Callable[[], str]


def _seeded(target: Target) -> str:
    case = make_case(SHAPE, TABLE, DTYPES, cfg=True)
    found = sample(on(case, target), TABLE, seed=8, backend=target.backend)
    here = sample(case, TABLE, seed=8)
    noise: dict[str, Any] = {"shape": SHAPE[1:], "seed": 8}
    there = gaussian_noise(**noise, sample_ids=case.sample_ids.to(target.device), backend=target.backend)
    ours = gaussian_noise(**noise, sample_ids=case.sample_ids, backend="cpu")
    apart = differing_bits(found.latents, here.latents)
    assert_same_noise(there.cpu(), ours, KERNELS_APART_ULPS)
    assert target.backend != "cuda" or apart == 0, f"{apart} bits of the latents are not the CPU's"
    return f"{differing_bits(there, ours)} bits of noise and {apart} of latents differ from the CPU's"


def _step(target: Target) -> str:
    test_parity.assert_sampling(make_case(SHAPE, TABLE, DTYPES, cfg=True), TABLE, target, F32)
    return "latents and x0 are the CPU's bits"


def _score(target: Target) -> str:
    test_parity.assert_scoring(make_case(SHAPE, TABLE, DTYPES, cfg=True), TABLE, target)
    return "score and gradients"


def _loss(target: Target) -> str:
    table = TABLES["mixed"]
    cases = [make_case((9, 3, 701), table, DTYPES, cfg=True, step=STEPS, seed=seed) for seed in range(4)]
    options: Any = OPTIONS["everything"]
    test_parity.assert_loss(cases, table, target, **options)
    return "loss, gradients and metrics"


def _ratio(target: Target) -> str:
    test_invariance.test_first_ratio_is_exactly_one(target, DTYPES, True, "exact", True)
    return "ratio exactly 1"


def _graph(target: Target) -> str:
    test_graphs.test_replays_follow_their_inputs(target)
    return "replays follow their inputs"


def _stream(target: Target) -> str:
    test_streams.test_a_side_stream(target)
    return "the same bits on a side stream"


def _block(target: Target, name: str) -> str:
    op = test_block_ops.make(name, target)
    found = test_block_ops.assert_parity(op, target, "lossless")
    plain = test_block_ops.results(op, "lossless", "reference")
    apart = sum(int((found[n] != plain[n]).sum()) for n in found)
    return f"{apart} of {sum(t.numel() for t in found.values())} elements differ from eager torch"


def _block_graph(target: Target, name: str) -> str:
    test_block_ops.TestBits().test_replays_of_a_graph_follow_their_inputs(target, name)
    return "replays follow their inputs"


OPS: dict[str, Callable[[Target], str]] = {
    "step": _step,
    "seeded step": _seeded,
    "score": _score,
    "loss": _loss,
    "ratio": _ratio,
    "graph": _graph,
    "side stream": _stream,
}
BLOCK_GRAPH = "gelu"


def parts(dry: bool) -> dict[str, dict[str, Check]]:
    """Part -> check -> call; a part of Triton is what one process compiles."""
    cuda, triton, block = (
        (Target("cpu", "cpu"), Target("cpu", "cpu"), Target("cpu", "reference"))
        if dry
        else (Target("cuda", "cuda"), Target("cuda", "triton"), Target("cuda", "triton"))
    )
    found: dict[str, dict[str, Check]] = {"cuda": {name: partial(run, cuda) for name, run in OPS.items()}}
    found |= {f"triton, {name}": {name: partial(run, triton)} for name, run in OPS.items()}
    found |= {f"block op, {name}": {name: partial(_block, block, name)} for name in test_block_ops.FEW}
    found[f"block op, graph of {BLOCK_GRAPH}"] = {"graph": partial(_block_graph, block, BLOCK_GRAPH)}
    return found


def run_part(part: str, checks: dict[str, Check], rows: Path | None, where: Row) -> bool:
    """Whether all passed; a row and a line each."""
    good = True
    for name, run in checks.items():
        begin, passed = time.monotonic(), False
        try:
            detail, passed = run(), True
        except pytest.skip.Exception as skipped:
            detail = f"skipped: {skipped}"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
            detail = f"{type(error).__name__}: {str(error) or place}"
        seconds = round(time.monotonic() - begin, 2)
        detail = detail.strip().split("\n")[0][:300]
        row = {"case": f"{part}: {name}", "op": "smoke", "part": part, "check": name, "passed": passed}
        add(rows, [{**row, "detail": detail, "seconds": seconds, "environment": where}])
        print(f"{'good' if passed else 'BAD '} {part}: {name}, {seconds:.1f} s: {detail}", flush=True)
        good &= passed
    return good
