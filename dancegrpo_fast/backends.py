"""What can run an op here, why something else cannot, and the rule that picks."""

import importlib
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from .transitions import PACKED_COLUMNS

# Below this many elements in a batch, waking a second thread costs more than it saves.
MIN_ELEMENTS_PER_THREAD = 1 << 15


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: whether it can run, and the reason or the details."""

    name: str
    available: bool
    detail: str


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"dancegrpo_fast.{name}")


@lru_cache(maxsize=1)
def _cpu() -> tuple[ModuleType | None, str]:
    try:
        base = _load("_cpu")
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    if base.table_columns != len(PACKED_COLUMNS):
        return None, "the compiled module belongs to another version; install the package again"
    level = base.processor_level()
    for candidate in (4, 3):
        if candidate <= level:
            try:
                return _load(f"_cpu_v{candidate}"), f"x86-64-v{candidate}, compiled by {base.compiler}"
            except ImportError:
                continue
    return base, f"baseline build, compiled by {base.compiler}"


def cpu_module() -> ModuleType:
    """The compiled CPU module for this processor.

    Raises:
        RuntimeError: it is not available; the message says why.
    """
    module, detail = _cpu()
    if module is None:
        raise RuntimeError(f'backend: "cpu" is not available, {detail}')
    return module


def available() -> list[Backend]:
    """Every backend, with the reason where one cannot be used."""
    module, detail = _cpu()
    return [
        Backend("cpu", module is not None, detail),
        Backend("cuda", False, "this version has no CUDA kernels; CUDA tensors use the reference"),
        Backend("triton", False, "this version has no Triton kernels; CUDA tensors use the reference"),
        Backend("reference", True, f"plain torch {torch.__version__}, any device"),
    ]


def pick(backend: str, device: torch.device) -> str:
    """The implementation that a call on `device` uses.

    Args:
        backend: "auto", "cpu" (compiled C++) or "reference" (plain torch).

    Raises:
        ValueError: an unknown name, or a backend that cannot run tensors of this device.
        RuntimeError: the compiled module was asked for by name and does not load.
    """
    if backend == "auto":
        return "cpu" if device.type == "cpu" and _cpu()[0] is not None else "reference"
    if backend == "reference":
        return backend
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f'backend: got "cpu" for tensors on {device}, want "auto" or "reference"')
        cpu_module()
        return backend
    raise ValueError(f'backend: got "{backend}", want "auto", "cpu" or "reference"')


def threads_for(elements: int) -> int:
    """Threads for a batch of so many elements: torch's own setting, or fewer where the work is small."""
    return max(1, min(torch.get_num_threads(), elements // MIN_ELEMENTS_PER_THREAD))
