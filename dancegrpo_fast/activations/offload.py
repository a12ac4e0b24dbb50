"""Inputs of checkpointed blocks in host memory from the forward to the backward."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary


class View(NamedTuple):
    """Where a tensor lies in its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostCopy:
    """One device tensor in host memory, with the copy that was fetched back before it is needed."""

    def __init__(self, tensor: Tensor, side: torch.cuda.Stream | None) -> None:
        self._device, self._side = tensor.device, side
        self._shape, self._stride = tensor.shape, tensor.stride()
        self.copied: torch.cuda.Event | None = None
        self._fetched: tuple[Tensor, torch.cuda.Event] | None = None
        # Strides that leave gaps are needed on the device only.
        like = tensor if _dense(tensor) else torch.empty(tensor.shape, device="meta")
        self._host = torch.empty_strided(
            tensor.shape, like.stride(), dtype=tensor.dtype, device="cpu", pin_memory=side is not None
        )
        if side is None:
            self._host.copy_(tensor)
            return
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._host.copy_(tensor, non_blocking=True)
            self.copied = side.record_event()

    def prefetch(self) -> None:
        """Starts the copy back on the side stream."""
        if self._side is None or self._fetched is not None:
            return
        # Memory of the main stream, which waits for the copy before it reads or frees it.
        tensor = self._room()
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            tensor.copy_(self._host, non_blocking=True)
            self._fetched = tensor, self._side.record_event()

    def fetch(self) -> Tensor:
        """The tensor, on its device."""
        if self._side is None:
            return self._room().copy_(self._host)
        self.prefetch()
        assert self._fetched is not None
        tensor, done = self._fetched
        torch.cuda.current_stream(self._device).wait_event(done)
        self._fetched = None
        return tensor

    def _room(self) -> Tensor:
        return torch.empty_strided(self._shape, self._stride, dtype=self._host.dtype, device=self._device)

    def __del__(self) -> None:
        # Fetched and never used: its memory must not be given away while the copy still writes to it.
        if getattr(self, "_fetched", None) is not None:
            torch.cuda.current_stream(self._device).wait_event(self._fetched[1])  # type: ignore[index]  # not None, as asked above


class BlockInputs:
    """The arguments of one block's call: handed over once in the forward, and again after they were fetched."""

    def __init__(self, args: Sequence[Any], places: dict[int, tuple[HostCopy, View]]) -> None:
        self._ready: list[Any] | None = list(args)
        self._rest = [None if i in places else arg for i, arg in enumerate(args)]
        self._places = places
        self.previous: weakref.ref[BlockInputs] | None = None

    @property
    def copies(self) -> list[HostCopy]:
        """Every copy once."""
        return list({id(copy): copy for copy, _ in self._places.values()}.values())

    def take(self) -> list[Any]:
        """The arguments; nothing here holds them afterwards."""
        ready, self._ready = self._ready, None
        assert ready is not None
        return ready

    def fetch(self) -> None:
        """Brings the arguments back, and starts to bring back those of the block before."""
        with torch.no_grad():
            bases = {id(copy): copy.fetch() for copy in self.copies}
        before = None if self.previous is None else self.previous()
        for copy in () if before is None else before.copies:
            copy.prefetch()
        ready = list(self._rest)
        for i, (copy, view) in self._places.items():
            # No leaf, as it was none, and two views of one tensor are that again: blocks may ask for either.
            ready[i] = bases[id(copy)].requires_grad_().as_strided(*view)
        self._ready = ready


class HostInputs:
    """Checkpoints blocks whose differentiable inputs wait in host memory.

    What several blocks get (embeddings, say) is copied once; arguments without a gradient, parameters and tensors
    expanded in memory stay where they are. On a GPU, the inputs of two blocks at most are on it besides the running
    block's.
    """

    def __init__(self) -> None:
        self._copies: Any = WeakIdKeyDictionary()
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[BlockInputs] | None = None
        # Inputs whose way to the host may still be under way.
        self._leaving: list[tuple[Tensor, HostCopy]] = []

    def checkpoint(
        self,
        block: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        contexts: Callable[[], tuple[Any, Any]],
    ) -> Any:
        """`torch.utils.checkpoint` of `block(*args, **kwargs)`; `contexts` as its `context_fn`."""
        self._release()
        inputs = self._stored(args)
        # Its device tells checkpoint whose random numbers to repeat.
        devices = [next(arg for arg in args if isinstance(arg, Tensor)).new_empty(0)]

        def run(*_: Tensor) -> Any:
            return block(*inputs.take(), **kwargs)

        @contextlib.contextmanager
        def fetched(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
            self._release()
            # Before the selective context, which wants to see the same ops as in the forward.
            inputs.fetch()
            with context:
                yield

        def wrapped() -> tuple[Any, Any]:
            forward, recompute = contexts()
            return forward, fetched(recompute)

        return checkpoint(run, *devices, use_reentrant=False, context_fn=wrapped)

    def _release(self) -> None:
        """Gives back what has left: the main stream waits for it, so its memory can be used at once."""
        for tensor, copy in self._leaving:
            if copy.copied is not None:
                torch.cuda.current_stream(tensor.device).wait_event(copy.copied)
        self._leaving = []

    def _stored(self, args: Sequence[Any]) -> BlockInputs:
        wanted = {
            i: arg
            for i, arg in enumerate(args)
            if isinstance(arg, Tensor) and arg.requires_grad and not arg.is_leaf and 0 not in _used_strides(arg)
        }
        parts: dict[int, int] = {}
        for arg in wanted.values():
            if arg._base is not None:
                parts[id(arg._base)] = parts.get(id(arg._base), 0) + arg.numel()
        places = {}
        for i, arg in wanted.items():
            base = arg._base
            # The parts of one tensor travel as that tensor.
            whole = base is not None and parts[id(base)] == base.numel() and base.requires_grad and _dense(base)
            source = base if base is not None and whole else arg
            offset = int(arg.storage_offset()) - int(source.storage_offset())
            places[i] = self._copy(source), View(arg.shape, arg.stride(), offset)
        inputs = BlockInputs(args, places)
        inputs.previous, self._last = self._last, weakref.ref(inputs)
        return inputs

    def _copy(self, tensor: Tensor) -> HostCopy:
        known = self._copies.get(tensor)
        found: HostCopy | None = None if known is None or known[1] != tensor._version else known[0]()
        if found is None:
            found = HostCopy(tensor.detach(), self._side(tensor.device))
            self._copies[tensor] = weakref.ref(found), tensor._version
            if found.copied is not None:
                self._leaving.append((tensor, found))
        return found

    def _side(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)
        return self._sides[device]


def _used_strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _dense(tensor: Tensor) -> bool:
    """Elements without gaps and without overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
