"""What can run an op here, why something else cannot, and the rule that picks."""

import importlib
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

from .checks import shown
from .transitions import PACKED_COLUMNS

# Below this many elements in a batch, waking a second thread costs more than it saves.
MIN_ELEMENTS_PER_THREAD = 1 << 15
NAMES = ("auto", "cpu", "cuda", "triton", "reference")
# The first versions that everything here works with; a later one is never refused.
TORCH_FLOOR = (2, 8)
TRITON_FLOOR = (3, 4)
# Of an NVIDIA device, for Triton: before it there is no bfloat16.
CAPABILITY_FLOOR = (8, 0)


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


@lru_cache(maxsize=1)
def _cuda() -> tuple[ModuleType | None, str]:
    try:
        module = _load("_cuda")
    except ModuleNotFoundError:
        return None, "not built: nvcc was not found at installation, or DGF_CUDA=OFF"
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    if module.table_columns != len(PACKED_COLUMNS):
        return None, "the compiled module belongs to another version; install the package again"
    return module, f"built with nvcc {module.compiler} for compute capabilities {module.architectures}"


_CPU = torch.device("cpu")
_cuda_ready: set[int] = set()


def _cuda_problem(index: int) -> str:
    """Why the compiled CUDA module cannot run on a device, or nothing, which alone is remembered."""
    if index in _cuda_ready:
        return ""
    module, detail = _cuda()
    if module is None:
        return detail
    with torch.cuda.device(index):
        problem = str(module.device_problem())
    if not problem:
        _cuda_ready.add(index)
    return problem


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _older(version: str, floor: tuple[int, int]) -> bool:
    """Whether a version is known to be below the floor."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < floor


def check_torch() -> None:
    """Refuses a torch that the ops do not work with.

    Raises:
        ImportError: it is older than `TORCH_FLOOR`.
    """
    if _older(torch.__version__, TORCH_FLOOR):
        raise ImportError(f"torch: got {torch.__version__}, want {_dotted(TORCH_FLOOR)} or later")


def check_name(backend: Any) -> None:
    """A name; whether it can run the call is asked where the devices are known.

    Raises:
        ValueError: it is not a string.
    """
    if not isinstance(backend, str):
        raise ValueError(f"backend: got {shown(backend)}, want one of {', '.join(map(shown, NAMES))}")


@cache
def _warn_of_left_out(name: str, problem: str) -> None:
    # Another implementation's sums differ in their last bits: a rollout and its replay must not mix them unnoticed.
    warnings.warn(f'backend: "auto" leaves {name} out, {problem}', RuntimeWarning, stacklevel=2)


@lru_cache(maxsize=1)
def _triton() -> tuple[bool, str]:
    wanted = f"want {_dotted(TRITON_FLOOR)} or later"
    try:
        module = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        missing = error.name == "triton"
        return False, f"Triton is not installed, {wanted}" if missing else f"Triton does not load: {error}"
    except ImportError as error:
        return False, f"Triton does not load: {error}"
    version = getattr(module, "__version__", None)
    if version is None:
        return False, f"Triton is not installed ({module} is another package), {wanted}"
    if _older(version, TRITON_FLOOR):
        return False, f"Triton {version} is too old, {wanted}"
    how = "interpreted (TRITON_INTERPRET), for tests only" if interpreting() else "compiled on first use"
    return True, f"Triton {version}, {how}"


@cache
def _triton_problem(index: int) -> str:
    """Why Triton cannot compile for a device here, or nothing; no kernel is compiled to find out."""
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(index)) < CAPABILITY_FLOOR:
        return f"the device has compute capability {_dotted(capability)}, want {_dotted(CAPABILITY_FLOOR)} or later"
    try:
        with torch.cuda.device(index):
            # The driver needs a C compiler, the hash asks the assembler for its version; any launch does both.
            target = importlib.import_module("triton.runtime").driver.active.get_current_target()
            importlib.import_module("triton.compiler").make_backend(target).hash()
    except Exception as error:
        return f"Triton cannot compile on this machine: {type(error).__name__}: {error}"
    return ""


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run a call, or nothing."""
    if name == "reference":
        return ""
    if name == "cpu":
        return "it runs CPU tensors" if device.type != "cpu" else "" if _cpu()[0] is not None else _cpu()[1]
    if name == "cuda":
        if device.type != "cuda" or torch.version.hip is not None:
            return "it runs tensors of an NVIDIA device"
        return _cuda_problem(device.index)
    usable, reason = _triton()
    if not usable:
        return reason
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return "it runs tensors of a GPU"
    if dtype == torch.float64:
        return "it computes in float32"
    return "" if interpreting() else _triton_problem(device.index)


def _there(name: str, found: tuple[ModuleType | None, str]) -> ModuleType:
    module, detail = found
    if module is None:
        raise RuntimeError(f'backend: "{name}" is not available, {detail}')
    return module


def cpu_module() -> ModuleType:
    """The compiled CPU module for this processor.

    Raises:
        RuntimeError: it is not available; the message says why.
    """
    return _there("cpu", _cpu())


def cuda_module() -> ModuleType:
    """The compiled CUDA module.

    Raises:
        RuntimeError: it is not available; the message says why.
    """
    return _there("cuda", _cuda())


def available() -> list[Backend]:
    """Every backend, with the reason where one cannot be used."""
    cpu, cpu_detail = _cpu()
    cuda, cuda_detail = _cuda()
    triton, triton_detail = _triton()
    if not torch.cuda.is_available():
        if cuda is not None:
            cuda, cuda_detail = None, f"{cuda_detail}, but torch sees no CUDA device"
        if triton and not interpreting():
            triton, triton_detail = False, f"{triton_detail}, but torch sees no GPU"
    else:
        index = torch.cuda.current_device()
        if cuda is not None and (problem := _cuda_problem(index)):
            cuda, cuda_detail = None, problem
        if triton and not interpreting() and (problem := _triton_problem(index)):
            triton, triton_detail = False, problem
    return [
        Backend("cpu", cpu is not None, cpu_detail),
        Backend("cuda", cuda is not None, cuda_detail),
        Backend("triton", triton, triton_detail),
        Backend("reference", True, f"plain torch {torch.__version__}, any device"),
    ]


def pick(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that a call on `device` uses.

    Args:
        backend: "cpu" (C++), "cuda" (CUDA C++), "triton", "reference" (plain torch), or "auto": the first of these
            that can run the call.
        device: of the tensors.
        dtype: what the call computes in, float32 or float64.

    Raises:
        ValueError: an unknown name, or a backend that cannot run such a call here; the message says why.
    """
    if backend == "auto":
        if device == _CPU and _cpu()[0] is not None:
            return "cpu"
        # The interpreter is for tests, which ask for it by name.
        order = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
        for name in order:
            reason = _refusal(name, device, dtype)
            if not reason:
                return name
            if device.type == "cuda" and (_cuda()[0] is not None if name == "cuda" else dtype != torch.float64):
                _warn_of_left_out("the CUDA module" if name == "cuda" else "Triton", reason)
        return "reference"
    check_name(backend)
    if backend not in NAMES:
        wanted = ", ".join(f'"{name}"' for name in NAMES)
        raise ValueError(f'backend: got "{backend}", want one of {wanted}')
    if reason := _refusal(backend, device, dtype):
        raise ValueError(
            f'backend: got "{backend}" for {dtype} tensors on {device}, but {reason}; want "auto" or "reference"'
        )
    return backend


def pick_block(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation of a transformer block op: Triton on a GPU where it can run, else the reference.

    "checked" is as "auto", but an op in "lossless" mode takes the reference for what fails its self check.

    Raises:
        ValueError: an unknown name, or Triton where it cannot run such a call; the message says why.
    """
    check_name(backend)
    if backend in ("auto", "checked"):
        if device.type != "cuda":
            return "reference"
        reason = _refusal("triton", device, dtype)
        if reason and dtype != torch.float64:
            _warn_of_left_out("Triton", reason)
        return "reference" if reason else "triton"
    if backend not in ("triton", "reference"):
        raise ValueError(f'backend: got "{backend}" for a block op, want "auto", "triton" or "reference"')
    return pick(backend, device, dtype)


def threads_for(elements: int) -> int:
    """Threads for a batch of so many elements: torch's own setting, or fewer where the work is small."""
    return max(1, min(torch.get_num_threads(), elements // MIN_ELEMENTS_PER_THREAD))
