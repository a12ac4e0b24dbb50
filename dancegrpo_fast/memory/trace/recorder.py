"""Watches operators, modules and checkpoints while a model runs, and follows every storage."""

import bisect
import contextlib
import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...activations import operators
from .result import Storage, Trace
from .tensors import CPU, Fake


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Among an operator's arguments or results, which nest in lists and tuples at most."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class Recorder(TorchDispatchMode):
    """Sees every operator, and so every tensor that python's dispatch can see."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and torch's guard against it costs more than the books.
        return False

    def __init__(
        self,
        paths: Mapping[int, str],
        modes: Callable[[], contextlib.AbstractContextManager[Any]],
        workspace: Callable[[Any, Any, Any], int],
    ) -> None:
        super().__init__()
        self.paths = paths
        # Bytes that an operator takes within itself, from its overload, arguments and result.
        self.workspace = workspace
        # Torch's function modes are off inside its backward; what is computed again there needs them.
        self.modes = modes
        self.storages: list[Storage] = []
        self.phases: dict[str, tuple[int, int]] = {}
        self.flops: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self.bytes: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self.launches: Counter[str] = Counter()
        self._live: dict[int, Storage] = {}
        self._checkpointed: set[int] = set()
        self.handed: Counter[str] = Counter()
        self._clock = 0
        self._phase = "load"
        self._recomputing = 0
        self._modules: list[str] = []
        # Autograd numbers its nodes in order: the first number made in each run of one module's operators.
        self._numbers: list[int] = []
        self._owners: list[str] = []
        self._number = torch._C._autograd._get_sequence_nr()

    # Storages.

    def _tick(self) -> int:
        self._clock += 1
        return self._clock - 1

    def _die(self, key: int, storage: Storage) -> None:
        if self._live.get(key) is storage:
            del self._live[key]
        storage.died, storage.died_phase, storage.reference = self._tick(), self._phase, None

    def note(self, tensor: Tensor, op: str, module: str, category: str = "") -> None:
        """Begins to follow a tensor's storage, unless it is followed already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        found = Storage(storage.nbytes(), op, module, self._phase, self._tick(), category, self._recomputing > 0)
        found.reference = weakref.ref(storage, lambda _: self._die(key, found))
        self._live[key] = found
        self.storages.append(found)

    def storage_of(self, tensor: Tensor) -> Storage | None:
        """What follows this tensor's storage."""
        return self._live.get(tensor.untyped_storage()._cdata)

    def _workspace(self, size: int, op: str, module: str) -> None:
        found = Storage(size, op, module, self._phase, self._tick(), "workspace", False)
        found.died, found.died_phase = self._tick(), self._phase
        self.storages.append(found)

    # Operators.

    def _module(self) -> str:
        if self._phase == "backward" and not self._recomputing:
            node = torch._C._current_autograd_node()
            if node is None:
                return ""
            place = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
            return self._owners[place] if place >= 0 else ""
        module = self._modules[-1] if self._modules else ""
        number = torch._C._autograd._get_sequence_nr()
        if not self._owners or self._owners[-1] != module:
            # The node of the operator that runs has its number already.
            self._numbers.append(self._number)
            self._owners.append(module)
        self._number = number
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # Of a fake tensor it is known, and asked for more often than all else.
            return CPU if isinstance(args[0], Fake) else func(*args, **kwargs)
        module = self._module()
        given = tensors_in((*args, *kwargs.values()))
        for tensor in given:
            self.note(tensor, "existing", "", "inputs")
        out = func(*args, **kwargs)
        made = tensors_in(out if isinstance(out, (tuple, list)) else (out,))
        known = operators.kind(func)
        for tensor in made:
            self.note(tensor, known.name, module)
        if size := self.workspace(func, args, out):
            self._workspace(size, known.name, module)
        phase = "recompute" if self._recomputing and self._phase == "backward" else self._phase
        cost = operators.cost(func, args, kwargs, out, given, made)
        if cost.flops:
            self.flops[phase][module, known.group] += cost.flops
        if cost.bytes:
            self.bytes[phase][module, known.group] += cost.bytes
        if cost.flops or cost.bytes:
            self.launches[phase] += 1
        return out

    # Phases, modules, checkpoints.

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Runs one phase; reference cycles that it leaves are collected at its end."""
        self._phase, start = name, self._clock
        yield
        gc.collect()
        self.phases[name] = (start, self._clock)

    def _enter_module(self, module: nn.Module) -> None:
        self._modules.append(self.paths.get(id(module), self._modules[-1] if self._modules else ""))

    def _watch_module(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._enter_module(module)
            try:
                return original(module, *args, **kwargs)
            finally:
                self._modules.pop()

        return call

    @contextlib.contextmanager
    def _recompute(self) -> Iterator[None]:
        modules, self._modules = self._modules, []
        self._recomputing += 1
        try:
            with self.modes():
                yield
        finally:
            self._recomputing -= 1
            self._modules = modules

    def _watch_checkpoint(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, kwargs))
            block = next((leaf for leaf in leaves if isinstance(leaf, nn.Module)), None)
            for tensor in leaves:
                if not isinstance(tensor, Tensor):
                    continue
                self.note(tensor, "existing", "", "inputs")
                storage = self._live[tensor.untyped_storage()._cdata]
                if id(storage) not in self._checkpointed and not storage.category and self._phase == "forward":
                    self.handed[self.paths.get(id(block), "")] += storage.size
                self._checkpointed.add(id(storage))

            def again(*inner: Any, **more: Any) -> Any:
                with self._recompute():
                    return fn(*inner, **more)

            return original(again, *args, **kwargs)

        return generator

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, operators, modules and recomputation are followed."""
        from ...ops import _block

        recomputed = _block._recomputed

        def again(*args: Any) -> Tensor:
            with self._recompute():
                return recomputed(*args)

        watched = self._watch_checkpoint(checkpointing._checkpoint_without_reentrant_generator)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(checkpointing, "_checkpoint_without_reentrant_generator", watched))
            stack.enter_context(mock.patch.object(_block, "_recomputed", again))
            # No hooks: blocks run otherwise where there are any.
            stack.enter_context(mock.patch.object(nn.Module, "__call__", self._watch_module(nn.Module.__call__)))
            stack.enter_context(self)
            yield

    # Categories.

    def sort_forward(self, outputs: Iterable[Tensor]) -> None:
        """After the forward: what lives is kept for the backward, unless it is the output."""
        handed = {id(self.storage_of(t)) for t in outputs}
        for storage in self.storages:
            if storage.category or storage.phase not in ("forward", "rollout"):
                continue
            if storage.died is not None:
                storage.category = "temporaries"
            elif id(storage) in handed or storage.phase == "rollout":
                storage.category = "outputs"
            else:
                storage.category = "block_inputs" if id(storage) in self._checkpointed else "saved"

    def sort_rest(self, gradients: Iterable[Tensor]) -> None:
        """After all: gradients, what was computed again, and temporaries."""
        kept = {id(self.storage_of(t)) for t in gradients}
        for storage in self.storages:
            if not storage.category:
                storage.category = (
                    "gradients"
                    if id(storage) in kept
                    else "recomputation"
                    if storage.recomputed
                    else "optimizer"
                    if storage.phase == "optimizer" and storage.died is None
                    else "temporaries"
                )

    def result(self) -> Trace:
        """Of all phases; storages are followed no longer."""
        for storage in self.storages:
            storage.reference = None
        return Trace(
            self.storages, self.phases, dict(self.flops), dict(self.bytes), dict(self.launches), dict(self.handed)
        )
