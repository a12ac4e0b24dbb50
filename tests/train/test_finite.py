"""What is not finite is found wherever it is, by name."""

from pathlib import Path

import pytest
import torch

from dancegrpo_fast.processes import Processes
from dancegrpo_fast.train.finite import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_is_found(value: float, dtype: torch.dtype) -> None:
    processes = Processes("no")
    largest = torch.finfo(dtype).max
    groups = {
        "model": {"a": torch.full((3, 5), largest, dtype=dtype), "none": torch.empty(0, dtype=dtype)},
        "optimizer": {"a/exp_avg": torch.zeros(7, dtype=dtype), "a/step": torch.tensor(3.0)},
        "rng": {"cpu": torch.zeros(4, dtype=torch.uint8)},
    }
    check_finite(groups, processes, 7, None)
    groups["optimizer"]["a/exp_avg"][6] = value
    with pytest.raises(RuntimeError, match=r"^iteration 7: optimizer a/exp_avg is not finite, .* checkpoint is none$"):
        check_finite(groups, processes, 7, None)
    groups["model"]["a"][2, 4] = value
    with pytest.raises(RuntimeError, match=r"7: model a and 1 more of 4 tensors are not .* checkpoint is run/000006$"):
        check_finite(groups, processes, 7, Path("run/000006"))
