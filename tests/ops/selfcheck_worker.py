"""One of two gloo processes, which differ in what their kernels get wrong. Started by test_selfcheck.py.

Usage: selfcheck_worker.py RANK FILE PORT OUTPUT; by a store in FILE, then by one on a free PORT.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dancegrpo_fast.ops import selfcheck
from dancegrpo_fast.ops.gated_residual import gated_residual

WIDTHS = (16, 24)


def verdicts(rank: int, method: str, wrong: int) -> dict[str, object]:
    """Which widths Triton computes, in the first call and later; kernels are wrong at the width met first, or last."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    order = WIDTHS if rank == 0 else WIDTHS[::-1]

    def plant(op: str, direction: str, place: int, value: Tensor) -> None:
        if value.shape[-1] == order[wrong]:
            value += 1

    from tests.ops.planted import in_place_of_triton

    by_triton: dict[int, list[bool]] = {}
    selfcheck.clear()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        launches = in_place_of_triton(patch, plant)["gated_residual"].launches
        for again in (False, True):
            for width in order:
                before = launches["forward"]
                x = torch.ones(1, 4, width)
                gated_residual(x, x, torch.ones(1, width), mode="lossless", backend="checked")
                # The first call compares one more launch.
                by_triton.setdefault(width, []).append(launches["forward"] - before - (not again) == 1)
                dist.barrier()
    dist.destroy_process_group()
    return {"by_triton": by_triton, "warned": [str(w.message) for w in warned if "self check" in str(w.message)]}


if __name__ == "__main__":
    # Behind the installed package.
    sys.path.append(str(Path(__file__).parents[2]))
    torch.set_num_threads(1)
    rank, file, port, output = sys.argv[1:]
    methods = (f"file://{file}", f"tcp://127.0.0.1:{port}")
    torch.save([verdicts(int(rank), *each) for each in zip(methods, (0, 1), strict=True)], f"{output}.{rank}")
