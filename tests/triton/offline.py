"""Compiles the Triton kernels for a GPU that is not there, through the launcher's own code."""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from dancegrpo_fast import backends
from dancegrpo_fast.ops import _launch, _triton
from dancegrpo_fast.ops._call import GradientTerms, LossOutputs, Noise, Objective, Transition

from ..ops.cases import BF16, F16, F32, TABLES

# latents x model output x next latents
MIXES = ((F32, BF16, F32), (F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, F16, BF16))
BATCH, SHAPE = 3, (16, 48, 32)
# Register budgets are the pinned Triton's. Other assemblers trade up to six numbers of a long row for another program.
PINNED = f"triton=={triton.__version__}" in (Path(__file__).parents[2] / "constraints.txt").read_text().split()
SPILLED = 0 if PINNED else 24


class _Driver:
    """What Triton asks of a driver before it compiles; every capability is a device of its own."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Launcher:
    """In place of Triton's: launches nothing."""

    def __init__(self, source: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        pass


class _Utilities:
    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


@contextlib.contextmanager
def launching(launcher: type[Launcher], folder: Path, capability: int = 90) -> Iterator[None]:
    """Ops of "triton" take CPU tensors, compile for a device that is not there, and call the launcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(_launch, "_bound", {})
        patch.setattr(backends, "_refusal", lambda *arguments: "")
        driver: Any = _Driver(capability)
        driver.utils, driver.launcher_cls = _Utilities(), launcher
        active = triton.runtime.driver
        patch.setattr(active, "_active" if hasattr(active, "_active") else "active", driver)
        yield


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _output(tool: str, *arguments: object) -> str:
    return subprocess.run([_TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    op: str
    kernel: str
    programs: int
    registers: int
    spilled: int
    shared: int
    ptx: str
    cubin: Path
    ttgir: str
    threads: int = 0
    # Type and value of each argument that the machine code gets.
    arguments: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def sums(self) -> list[str]:
        """How the operands of sums across threads lie in them, which the order of additions follows from."""
        layouts = dict(re.findall(r"^(#\w+) = (.*)$", self.ttgir, re.MULTILINE))
        found = re.findall(r"}\) : \((tensor<.*?>)(?:, .*)?\) ->", self.ttgir)
        # What is summed over several dimensions at once is reshaped before.
        found += re.findall(r"tt\.reshape .*? : (tensor<.*?>) ->", self.ttgir)
        return [re.sub(r"#\w+", lambda name: layouts[name[0]], each) for each in found]

    @cached_property
    def sass(self) -> str:
        """Machine code, disassembled where it is read only: that takes as long as to compile."""
        return _output("nvdisasm", "-c", "-ndf", self.cubin)


def op_of(kernel: Any) -> str:
    """The room that a kernel is in."""
    return str(kernel.fn.__module__.split(".")[-2])


def _inspect(op: str, kernel: Any, folder: Path) -> Compiled:
    cubin = folder / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = _output("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    shared = kernel.metadata.shared
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    threads = 32 * kernel.metadata.num_warps
    return Compiled(op, kernel.metadata.name, 0, registers, stack + local, shared, ptx, cubin, ttgir, threads)


def _passed(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Of an argument, or of a tuple of them, what is not compiled in."""
    if isinstance(kind, tuple):
        for inner, given in zip(kind, value, strict=True):
            yield from _passed(inner, given)
    elif kind != "constexpr":
        yield kind, value


@contextlib.contextmanager
def compiling(capability: int, folder: Path) -> Iterator[list[Compiled]]:
    """Launches become compilations; the list gets one entry a launch."""
    found: list[Compiled] = []
    known: dict[str, Compiled] = {}

    def compile_only(kernel: Any, programs: int, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        made = kernel.warmup(*arguments, grid=(programs,), **settings)
        if made.hash not in known:
            known[made.hash] = _inspect(op_of(kernel), made, folder)
        kinds = made.src.signature
        passed = (each for name, value in zip(kinds, arguments, strict=False) for each in _passed(kinds[name], value))
        found.append(replace(known[made.hash], programs=programs, arguments=tuple(passed)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(_launch, "launch", compile_only)
        driver = triton.runtime.driver
        # A plain attribute up to Triton 3.4.
        patch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", _Driver(capability))
        yield found


def launched(
    capability: int, folder: Path, run: Callable[..., object], *given: object, **how: object
) -> list[Compiled]:
    """What one call compiles."""
    with compiling(capability, folder) as launches:
        run(*given, **how)
    return launches


def assert_compiled_once(folder: Path, kernels: Sequence[Any], calls: Iterable[Callable[[], object]]) -> None:
    """Every call after the first one finds its kernels compiled."""
    known: list[set] = []
    with compiling(90, folder):
        for call in calls:
            call()
            keys = [{key for caches in kernel.device_caches.values() for key in caches[0]} for kernel in kernels]
            known = known or keys
            assert keys == known and all(keys)


def as_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Tensors:
    """Arguments of one call with nothing in them; `layout` is applied to every `[B, ...]` tensor."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = MIXES[0]
    cfg: bool = False
    per_sample: bool = False
    rounding: bool = False
    layout: Callable[[Tensor], Tensor] = as_is
    shape: tuple[int, ...] = (BATCH, *SHAPE)
    # "meta" has room for any shape.
    device: str = "cpu"

    def new(self, dtype: torch.dtype) -> Tensor:
        return self.layout(torch.empty(self.shape, dtype=dtype, device=self.device))

    def like(self, index: int) -> Tensor:
        return self.new(self.dtypes[index])

    def call(self) -> Transition:
        step = torch.zeros(BATCH, dtype=torch.int64) if self.per_sample else None
        table = TABLES["flow"].packed(torch.device("cpu"), F32)
        shared = (self.like(0), self.like(1), self.like(2), self.like(1) if self.cfg else None)
        return Transition(*shared, 4.5, table, step, 1, self.rounding, "triton")


def numbers() -> Tensor:
    return torch.empty(BATCH)


def sample(t: Tensors, seeded: bool = True) -> None:
    noise = Noise(None, 7, None) if seeded else Noise(t.new(F32), None, None)
    _triton.sample(t.call(), noise, numbers(), None)


def log_prob(t: Tensors) -> None:
    _triton.log_prob(t.call(), numbers())


def log_prob_gradient(t: Tensors) -> None:
    _triton.log_prob_gradient(t.call(), numbers(), t.like(1), t.like(1) if t.cfg else None)


def policy_loss(t: Tensors, options: bool = False) -> None:
    """With `options`, KL and RatioNorm too."""
    settings = (1e-4, 2e-4, 5.0)
    more = (t.like(1), t.like(1), *settings, 0.1, True) if options else (None, None, *settings, 0.0, False)
    outputs = (torch.empty(()), numbers(), numbers(), torch.empty(8), torch.empty(BATCH, dtype=torch.bool))
    out = LossOutputs(*outputs, numbers(), numbers())
    weight = numbers() if options else None
    _triton.policy_loss(t.call(), Objective(numbers(), numbers(), weight, *more), out)


def policy_loss_gradient(t: Tensors, options: bool = False) -> None:
    pulls = (t.like(1), t.like(1)) if options else (None, None)
    terms = GradientTerms(torch.empty(()), numbers(), numbers(), *pulls)
    _triton.policy_loss_gradient(t.call(), terms, t.like(1), t.like(1) if t.cfg else None)
