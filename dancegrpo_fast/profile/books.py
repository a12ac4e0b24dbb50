"""The profiler's books: `Recorder` on a real run of any length, with categories settled phase by phase."""

import bisect
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks

from ..activations import operators
from ..activations.streaming import Streamed
from ..memory.planning.budget import CATEGORIES
from ..memory.trace.recorder import Recorder, tensors_in
from ..memory.trace.result import Storage

# Storages on the books before dead ones are dropped.
COMPACT = 50_000
# Moments of a segment that are kept: at most so many, and half as many at least once it made so many storages.
MOMENTS = 80


@dataclass(frozen=True)
class Segment:
    """One uninterrupted piece of a phase: what lived at its peak, and what ran then.

    `timeline` has (share of its time that has passed, bytes by category) of the highest moment in each of some parts.
    """

    name: str
    seconds: float
    budget: dict[str, int]
    saved_by_group: dict[str, int]
    op: str
    module: str
    start_bytes: int
    timeline: tuple[tuple[float, dict[str, int]], ...] = ()

    @property
    def bytes(self) -> int:
        """At the peak."""
        return sum(self.budget.values())


class _Moment(NamedTuple):
    """The most bytes among some consecutive storages: the clock's time of it, what ran, and the second."""

    bytes: int
    at: int
    op: str
    module: str
    second: float


def sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Totals by key, those of `CATEGORIES` in their order."""
    found: Counter[str] = Counter()
    for key, size in pairs:
        found[key] += size
    order = [key for key in CATEGORIES if key in found]
    return {key: found[key] for key in [*order, *(key for key in found if key not in CATEGORIES)]}


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


class Books(Recorder):
    """Follows all tensor storages of one kind of device, from those that are there to those that are made.

    Args:
        device: of the storages.
        boundary: called where a segment starts (with None) and ends, outside of its time.
        wait: called at the end of a segment's time, for a device that works behind python's back.
    """

    def __init__(
        self,
        device: torch.device,
        boundary: Callable[[Segment | None], None],
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.module_names: dict[int, str] = {}
        within = operators.workspace if device.type == "cuda" else operators.no_workspace
        super().__init__(self.module_names, contextlib.nullcontext, within)
        self.device, self.boundary, self.wait = device, boundary, wait
        self.names: list[str] = []
        self._parameters: dict[int, Tensor] = {}
        self._bytes = self._start_bytes = 0
        # The highest moment of every `_stride` storages; of the last ones, `_made` so far, it may still change.
        self._moments: list[_Moment] = []
        self._made, self._stride = 0, 1
        self._limit = COMPACT
        self._graph = False
        self._began = 0.0

    # Storages.

    def note(self, tensor: Tensor, op: str, module: str, category: str = "") -> None:
        """Keeps a storage of the measured device; what a phase was given are trajectories."""
        if tensor.device.type != self.device.type or tensor.layout != torch.strided:
            return
        count = len(self.storages)
        super().note(tensor, op, module, "trajectories" if category == "inputs" else category)
        if len(self.storages) == count:
            return
        self._bytes += self.storages[-1].size
        if self._made == self._stride:
            self._next_moment()
        self._made += 1
        if self._made == 1:
            self._moments.append(self._now(op, module))
        elif self._bytes > self._moments[-1].bytes:
            self._moments[-1] = self._now(op, module)
        if count > self._limit:
            self._compact()

    def _die(self, key: int, storage: Storage) -> None:
        super()._die(key, storage)
        self._bytes -= storage.size

    def _workspace(self, size: int, op: str, module: str) -> None:
        """An estimate, which is not measured."""

    def _now(self, op: str, module: str) -> _Moment:
        return _Moment(self._bytes, self._clock, op, module, time.perf_counter())

    def _next_moment(self) -> None:
        self._made = 0
        if len(self._moments) >= MOMENTS:
            pairs = [self._moments[i : i + 2] for i in range(0, len(self._moments), 2)]
            self._moments = [max(pair, key=lambda moment: moment.bytes) for pair in pairs]
            self._stride *= 2

    def _budgets(self) -> list[list[Storage]]:
        """What lived at each of the moments."""
        times = [moment.at for moment in self._moments]
        found: list[list[Storage]] = [[] for _ in times]
        for s in self.storages:
            last = len(times) if s.died is None else bisect.bisect_right(times, s.died)
            for i in range(bisect.bisect_right(times, s.born), last):
                found[i].append(s)
        return found

    def _compact(self) -> None:
        """Drops what is dead and lived at no moment that is kept."""
        seen = {id(s) for alive in self._budgets() for s in alive}
        self.storages = [s for s in self.storages if s.died is None or id(s) in seen]
        self._checkpointed &= {id(s) for s in self.storages}
        self._limit = COMPACT + 2 * len(self.storages)

    # What is there already.

    def census(self) -> None:
        """Notes every tensor that python's garbage collector knows: of models, their gradients, optimisers, others."""
        gc.collect()
        objects = gc.get_objects()
        modules = [m for m in objects if issubclass(type(m), nn.Module) and "_modules" in vars(m)]
        inner = {id(child) for module in modules for child in module._modules.values()}
        roots = [module for module in modules if id(module) not in inner]
        trained = [root for root in roots if any(p.requires_grad for p in root.parameters())]
        for root in trained:
            self.note_model(root, "parameters")
        for optimizer in (o for o in objects if issubclass(type(o), Optimizer) and "state" in vars(o)):
            self.note_optimizer(optimizer)
        for root in roots:
            self.note_model(root, "other models")
        for streamed in (o for o in objects if type(o) is Streamed):
            # Where the device is a CPU, what waits for it is there as well.
            self.note(streamed.host, "load", "", "other models")
        for tensor in objects:
            if type(tensor) in (Tensor, nn.Parameter):
                self.note(tensor, "existing", "", "trajectories")

    def note_model(self, root: nn.Module, category: str) -> None:
        """Notes parameters, buffers, other tensors and gradients of a model, and the names of its modules."""
        for path, module in root.named_modules():
            self.module_names.setdefault(id(module), path)
            # Some models keep tables as plain attributes.
            held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            for tensor in tensors_in(held):
                self.note(_local(tensor), "load", path, category)
        self._note_parameters(root.parameters())

    def _note_parameters(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            self._parameters[id(p)] = p
            if p.grad is not None:
                self.note(_local(p.grad), "load", "", "gradients")

    def note_optimizer(self, optimizer: Optimizer) -> None:
        """Notes an optimiser's state, also where it is noted as something else, and weights that no model has."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.note(_local(p), "load", "", "master weights")
            self._note_parameters(group["params"])
        for state in list(optimizer.state.values()):
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    self.note(_local(tensor), "load", "", "optimizer")
                    if found := self.storage_of(_local(tensor)):
                        found.category = "optimizer"

    def _enter_module(self, module: nn.Module) -> None:
        if not self._modules and id(module) not in self.module_names:
            trained = any(p.requires_grad for p in module.parameters())
            self.note_model(module, "parameters" if trained else "other models")
        super()._enter_module(module)

    # Operators.

    def _module(self) -> str:
        # Autograd makes no nodes here, so that there is nothing to number.
        if self._phase != "backward" and not torch.is_grad_enabled():
            return self._modules[-1] if self._modules else ""
        return super()._module()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            # Tensors with operators of their own, DTensors among them, come back as plain ones.
            return NotImplemented
        if not self._graph and torch.is_grad_enabled():
            self._graph = any(t.requires_grad for t in args if isinstance(t, Tensor))
        return super().__torch_dispatch__(func, types, args, kwargs)

    # Phases.

    def open(self) -> None:
        """A segment of the innermost phase begins."""
        name = self.names[-1]
        self._phase = "backward" if name.endswith("backward") else "optimizer" if name == "optimizer" else "forward"
        self.storages = [s for s in self.storages if s.died is None]
        self._checkpointed &= {id(s) for s in self.storages}
        self._limit = COMPACT + 2 * len(self.storages)
        self._graph = False
        self.boundary(None)
        self._start_bytes = self._bytes
        self._began = time.perf_counter()
        self._moments, self._made, self._stride = [self._now("", "")], 1, 1

    def close(self) -> None:
        """It ends: what was made in it gets its category."""
        if self.wait is not None:
            self.wait()
        seconds = time.perf_counter() - self._began
        grads = {id(self.storage_of(_local(p.grad))) for p in self._parameters.values() if p.grad is not None}
        for storage in self.storages:
            if not storage.category:
                storage.category = self._category(storage, id(storage) in grads)
        budgets = self._budgets()
        top = max(range(len(budgets)), key=lambda i: self._moments[i].bytes)
        moment, peak = self._moments[top], budgets[top]
        self.boundary(
            Segment(
                self.names[-1],
                seconds,
                sums((s.category, s.size) for s in peak),
                sums((s.group, s.size) for s in peak if s.category == "saved"),
                moment.op,
                moment.module,
                self._start_bytes,
                tuple(
                    (min((m.second - self._began) / (seconds or 1.0), 1.0), sums((s.category, s.size) for s in alive))
                    for m, alive in zip(self._moments, budgets, strict=True)
                ),
            )
        )

    def _category(self, storage: Storage, is_gradient: bool) -> str:
        if is_gradient:
            return "gradients"
        if self._phase == "backward" or storage.died is not None:
            return "recomputation" if storage.recomputed else "temporaries"
        if self._phase == "optimizer":
            return "temporaries"
        if not self._graph:
            # Kept without a graph: what a rollout leaves behind.
            return "trajectories"
        return "block inputs" if id(storage) in self._checkpointed else "saved"

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """A phase; the one around it rests."""
        depth = len(self.names)
        if self.names:
            self.close()
        self.names.append(name)
        self.open()
        try:
            yield
        finally:
            self.close()
            del self.names[depth:]
            if self.names:
                self.open()

    def addresses(self) -> dict[int, str]:
        """Categories of living storages, by address."""
        alive = [(s, s.reference()) for s in self.storages if s.died is None and s.reference is not None]
        return {kept.data_ptr(): s.category for s, kept in alive if kept is not None}

    @contextlib.contextmanager
    def keeping(self, before: dict[str, int]) -> Iterator[None]:
        """Keeps the books of what runs inside; backward and optimiser steps become phases by themselves.

        Args:
            before: gets the bytes by category that are there already.
        """
        original = torch.autograd.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            if self._phase == "backward":
                return original(*args, **kwargs)
            with self.inside("replay backward" if self.names[-1] == "replay forward" else "backward"):
                return original(*args, **kwargs)

        steps = contextlib.ExitStack()

        def step_begins(optimizer: Optimizer, *_: Any) -> None:
            self.note_optimizer(optimizer)
            if self._phase != "optimizer":
                steps.enter_context(self.inside("optimizer"))

        def step_ends(optimizer: Optimizer, *_: Any) -> None:
            self.note_optimizer(optimizer)
            steps.close()

        with contextlib.ExitStack() as stack:
            self.census()
            before.update(sums((s.category, s.size) for s in self.storages))
            stack.enter_context(mock.patch.object(torch.autograd, "backward", backward))
            stack.callback(optimizer_hooks.register_optimizer_step_pre_hook(step_begins).remove)
            stack.callback(optimizer_hooks.register_optimizer_step_post_hook(step_ends).remove)
            stack.callback(self.release)
            stack.enter_context(self.watching())
            stack.enter_context(self.inside("other"))
            # A step that failed leaves its phase open.
            stack.enter_context(steps)
            yield

    def release(self) -> None:
        """Follows nothing any longer."""
        for storage in self.storages:
            storage.reference = None
        self.storages, self._live = [], {}
        self._parameters = {}
