"""One kernel a call: counted by the profiler on a GPU, and anywhere by the torch operators that would start another."""

from collections.abc import Callable

import pytest
import torch

from dancegrpo_fast import policy_loss

from ..ops.cases import BF16, F32, TABLES, make_case
from .activity import device_activity, ops_that_launch, profiler_sees_kernels, waits_for_the_device
from .calls import calls_of
from .targets import GPU_TARGETS, HOST_TARGETS, Target, on, on_gpu_targets

TABLE = TABLES["flow"]
CALLS = ("seeded step", "step with x0", "log_prob", "log_prob backward", "loss", "loss backward")
# One block a sample, and many.
SHAPES = ((3, 100), (3, 7, 2500))


def assert_one_kernel(run: Callable[[], object]) -> None:
    if not profiler_sees_kernels():
        pytest.skip("the profiler sees no kernels on this machine")
    kernels, memory = device_activity(run)
    assert len(kernels) == 1 and memory == [], kernels + memory


@on_gpu_targets
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_one_kernel_and_nothing_else(target: Target, name: str, shape: tuple[int, ...]) -> None:
    run = calls_of(on(make_case(shape, TABLE, (F32, BF16, F32)), target), TABLE, target.backend)[name]
    run()
    assert not waits_for_the_device(run)
    assert_one_kernel(run)


@pytest.mark.parametrize("target", HOST_TARGETS[:1])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("step", [1, torch.tensor([2, 0, 1])], ids=["one step", "per sample"])
@pytest.mark.parametrize("name", CALLS)
def test_torch_starts_nothing_beside_our_op(target: Target, name: str, step: int | torch.Tensor, cfg: bool) -> None:
    case = make_case((3, 100), TABLE, (F32, BF16, F32), cfg=cfg, step=step)
    run = calls_of(case, TABLE, target.backend)[name]
    run()
    found = ops_that_launch(run)
    assert len(found) == 1 and found[0].startswith("dgf::"), found


def plain_loss(target: Target) -> Callable[[], object]:
    """A loss without weights, as most scripts call it."""
    given = on(make_case((3, 100), TABLE), target).lost(TABLE)
    return lambda: policy_loss(*given, backend=target.backend)


@pytest.mark.parametrize("target", [*HOST_TARGETS[:1], *GPU_TARGETS])
def test_a_loss_without_weights_starts_nothing_else(target: Target) -> None:
    run = plain_loss(target)
    run()
    if target.device == "cpu":
        found = ops_that_launch(run)
        assert len(found) == 1, found
        return
    assert_one_kernel(run)
