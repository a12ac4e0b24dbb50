"""What a real call takes, by two accounts that the predictions have no part in."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dancegrpo_fast.activations import offload

MARK = "the forward is over"


@dataclass(frozen=True)
class Account:
    """Bytes of one call.

    Attributes:
        fixed: weights, gradients and inputs, before the call.
        peak: of everything.
        saved: kept from the forward to the backward, without the output.
        device_peak: without what waits in host memory.
        allocator_peak, allocator_saved: by torch's CPU allocator.
        allocator_op: the operators, outermost first, within which the allocator had its peak.
    """

    fixed: int
    peak: int
    saved: int
    device_peak: int
    allocator_peak: int
    allocator_saved: int
    allocator_op: str


class Ledger(TorchDispatchMode):
    """The storages that live after each operator; what one allocates and frees within itself is not seen.

    Args:
        fixed: tensors that are there before and outlive the call.
        host: of weights that wait in host memory.
    """

    def __init__(self, fixed: Any, host: Any = ()) -> None:
        super().__init__()
        self._fixed: set[int] = set()
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._host: set[int] = set()
        self._leaving = self._inside = False
        self._add(fixed)
        self.fixed = sum(size for _, size in self._known.values())
        self._fixed, self._known = set(self._known), {}
        self._leaving = True
        self._add(host)
        self._leaving = False
        self.peak = self.device_peak = self.fixed

    def _add(self, tree: Any) -> bool:
        """Follows the tensors' storages, and says whether one is new."""
        before = len(self._known)
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                # A weak reference keeps the address from being given to another storage.
                if key not in self._known and key not in self._fixed:
                    self._known[key] = StorageWeakRef(storage), storage.nbytes()
                    self._host.update([key] if self._leaving else [])
        return len(self._known) > before

    def live(self) -> tuple[int, int]:
        """Bytes of all storages that are still there, and of those that are not in host memory."""
        gone = [key for key, (reference, _) in self._known.items() if reference.expired()]
        for key in gone:
            del self._known[key]
            self._host.discard(key)
        total = self.fixed + sum(size for _, size in self._known.values())
        return total, total - sum(self._known[key][1] for key in self._host)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            # Some operators of ours are made of others on a CPU, and run a backward of their own.
            return func(*args, **(kwargs or {}))
        self._inside = True
        out = func(*args, **(kwargs or {}))
        self._inside = False
        self._observe(new=self._add((args, kwargs, out)))
        return out

    def _observe(self, *, new: bool) -> None:
        """After an operator, which may have brought new storages."""
        if new:
            total, device = self.live()
            self.peak, self.device_peak = max(self.peak, total), max(self.device_peak, device)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, operators are followed, and what checkpoints carry to host memory is known."""
        original = offload.HostCopy.__init__

        def leaving(*args: Any) -> None:
            self._leaving = True
            original(*args)
            self._leaving = False

        with mock.patch.object(offload.HostCopy, "__init__", leaving), self:
            yield


def _allocator(events: Any, fixed: int) -> tuple[int, int, str]:
    """The peak, what lived when the forward was over, and the operators at the peak."""
    ordered = sorted(events, key=lambda event: event.start_ns())
    live = peak = kept = fixed
    when = 0
    for event in ordered:
        if event.name() == MARK:
            kept = live
        elif event.name() == "[memory]" and event.device_type().name == "CPU":
            live += event.nbytes()
            if live > peak:
                peak, when = live, event.start_ns()
    inside = [
        event.name()
        for event in ordered
        if "::" in event.name() and event.start_ns() <= when <= event.start_ns() + event.duration_ns()
    ]
    # One operator may call itself by another overload.
    return peak, kept, " > ".join(dict.fromkeys(inside))


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """The garbage collector runs where it is told to."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    train: bool,
    autocast: torch.dtype | None = None,
    host: Sequence[Tensor] = (),
) -> Account:
    """Runs a real model once on the CPU; of a training call with gradients there before.

    Args:
        model: with its weights.
        inputs: keyword arguments.
        train: forward and backward; else a forward without gradients.
        autocast: of the forward.
        host: of weights that wait in host memory.
    """
    for p in model.parameters():
        if train and p.requires_grad:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in model.parameters()]
    # Qwen-Image has its rotary tables as plain attributes.
    tables = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    ledger = Ledger([*model.parameters(), *model.buffers(), *grads, *tables, dict(inputs)], host)
    mixed = torch.autocast("cpu", autocast, enabled=autocast is not None)
    with _collected(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        with ledger.watching(), torch.set_grad_enabled(train):
            with mixed:
                output: Tensor = model(**inputs)[0]
            gc.collect()
            kept, _ = ledger.live()
            result = output.untyped_storage().nbytes()
            with record_function(MARK):
                pass
            if train:
                output.backward(torch.ones_like(output))
        del output
    found: Any = watched.profiler
    peak, held, op = _allocator(found.kineto_results.events(), ledger.fixed)
    none = ledger.fixed + result
    return Account(
        ledger.fixed,
        ledger.peak,
        kept - none,
        ledger.device_peak,
        peak,
        held - none,
        op,
    )
