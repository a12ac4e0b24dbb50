"""What one call starts on the device, and whether the host waits: rows beside the timings."""

from functools import partial
from typing import Any

import torch

from tests.gpu.activity import device_activity, ops_that_launch, profiler_sees_kernels, waits_for_the_device

from . import host
from .plan import Plan


def rows(plan: Plan, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per public function and backend; on the CPU the torch operators that would launch, ours included."""
    found: list[dict[str, Any]] = []
    if plan.device.type == "cuda" and not profiler_sees_kernels():
        print("launches are not counted: the profiler sees no kernels on this machine", flush=True)
        return found
    for backend in plan.implementations.values():
        for name, run in host.calls(backend, plan.device).items():
            call = partial(run, 0)
            call()
            if plan.device.type == "cuda":
                torch.cuda.synchronize()
                kernels, memory = device_activity(call)
                waits = waits_for_the_device(call)
            else:
                kernels, memory, waits = ops_that_launch(call), [], False
            found.append(
                {
                    "op": "launches",
                    "backend": f"{backend}: {name}",
                    "kernels": len(kernels),
                    "memory_operations": len(memory),
                    "waits": waits,
                    "names": kernels + memory,
                    "environment": environment,
                }
            )
    return found
