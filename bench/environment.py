"""Where a benchmark ran: what every row carries."""

import datetime
import importlib.metadata
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast import backends

from .repository import commit


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def environment(device: torch.device | None = None, *, dry: bool = False) -> dict[str, Any]:
    """What every row carries; of the GPU too where one was measured. `dry`: the numbers are no measurements."""
    gpu = device is not None and device.type == "cuda"
    native = next(b for b in backends.available() if b.name == ("cuda" if gpu else "cpu"))
    packages = {n: importlib.metadata.version(n) for n in ("diffusers", "peft", "triton") if find_spec(n)}
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        **(_gpu(device) if gpu and device is not None else {}),
        "torch": torch.__version__,
        **packages,
        "kernels": native.detail,
        "python": platform.python_version(),
        "git": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"dry": True} if dry else {}),
    }
