"""What a call does on a device: its kernels, its copies and fills, and whether it makes the host wait."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# These allocate or look at memory and start nothing on a device.
FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_"),
    *("alias", "as_strided", "detach", "detach_", "expand", "lift_fresh", "reshape", "result_type", "select", "set_"),
    *("slice", "squeeze", "stride", "t", "to", "transpose", "unbind", "unsqueeze", "view", "view_as", "_reshape_alias"),
)


def device_activity(run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Names of the kernels of one call, and of its copies and fills of memory; call it once before."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in record.events() if e.device_type == DeviceType.CUDA]
    memory = [n for n in names if n.startswith(("Memcpy", "Memset"))]
    return [n for n in names if n not in memory], memory


@lru_cache(maxsize=1)
def profiler_sees_kernels() -> bool:
    """Whether the profiler works on this machine."""
    value = torch.ones(8, device="cuda")
    return len(device_activity(lambda: value + value)[0]) == 1


def ops_that_launch(run: Callable[[], object]) -> list[str]:
    """The torch operators in a call that would start work on a device, those inside our ops included."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    names = [e.name for e in record.events()]
    return [n for n in names if n.startswith(("aten::", "dgf::")) and n.removeprefix("aten::") not in FREE]


def waits_for_the_device(run: Callable[[], object]) -> bool:
    """Whether one call makes the host wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
