"""Where the same test body runs: our kernels on a GPU, and those of the CPU, so that Python errors show without one."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dancegrpo_fast import backends

from ..ops.cases import F64, Case
from .activity import waits_for_the_device


@dataclass(frozen=True)
class Target:
    """A device and the implementation that runs there."""

    device: str
    backend: str

    def holds(self, *dtypes: torch.dtype) -> bool:
        """Whether this implementation takes these dtypes; Triton computes in float32."""
        return self.backend != "triton" or F64 not in dtypes

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def _on_gpu(backend: str) -> list:
    found = {b.name: b for b in backends.available()}[backend]
    marks = [pytest.mark.gpu]
    if not torch.cuda.is_available():
        marks.append(pytest.mark.skipif(True, reason="no CUDA device"))
    elif backend == "triton" and not found.available:
        marks.append(pytest.mark.skipif(True, reason=found.detail))
    # A CUDA module that does not load on a GPU machine fails its tests: that is what they are for.
    return [pytest.param(Target("cuda", backend), marks=marks, id=backend)]


HOST_TARGETS = [pytest.param(Target("cpu", "cpu"), id="cpu")]
if backends.interpreting():
    HOST_TARGETS.append(pytest.param(Target("cpu", "triton"), id="interpreted"))
GPU_TARGETS = [*_on_gpu("cuda"), *_on_gpu("triton")]
TARGETS = [*HOST_TARGETS, *GPU_TARGETS]
on_every_target = pytest.mark.parametrize("target", TARGETS)
on_gpu_targets = pytest.mark.parametrize("target", GPU_TARGETS)


def on(case: Case, target: Target) -> Case:
    """A case with every tensor on the target's device."""
    given = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{n: t.to(target.device) for n, t in given.items() if isinstance(t, Tensor)})


def at_home(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results on the CPU."""
    return {name: value.detach().cpu() for name, value in found.items()}


def differing_bits(actual: Tensor, expected: Tensor) -> int:
    """Bits in which two tensors of one dtype differ."""
    first, second = (t.cpu().contiguous().flatten().view(torch.uint8).numpy() for t in (actual, expected))
    return int(np.unpackbits(first ^ second).sum())


@contextmanager
def stream_of(target: Target) -> Iterator[None]:
    """Another stream than the default one, in order with it."""
    if target.device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def assert_nothing_waits(target: Target, runs: Collection[Callable[[], object]]) -> None:
    """No call makes the host wait for the device, but perhaps its first one."""
    for run in runs:
        run()
    target.synchronize()
    for run in runs:
        assert target.device == "cpu" or not waits_for_the_device(run)


def captured(target: Target, run: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Outputs of a graph of `run`, and its replay; on the CPU a replay runs again into the same outputs."""
    if target.device == "cpu":
        outputs = run()

        def replay() -> None:
            for name, value in run().items():
                outputs[name].copy_(value)

        return outputs, replay
    with stream_of(target):
        run()  # compiles, loads and copies tables, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


def guard(target: Target, index: int):
    """A device made current, or nothing on the CPU."""
    return nullcontext() if target.device == "cpu" else torch.cuda.device(index)
