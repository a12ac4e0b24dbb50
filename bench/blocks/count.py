"""Counts what an eager block moves and saves, operator by operator."""

import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dancegrpo_fast.memory.trace.fake import CudaOperators, weight_gradient
from dancegrpo_fast.ops import lora_linear

from .configurations import Configuration, Setup

EXCLUDED = ("mm", "addmm", "addmm_", "mm_float32", "bmm", "baddbmm", "linear", "convolution")
ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")
# Their first argument gives no more than a shape.
FILL = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
OVERWRITE = ("copy_", "zero_", "fill_")


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor covers in memory: an expanded dimension is one element wide."""
    numbers = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n)
    return numbers * tensor.element_size()


def is_compute(name: str) -> bool:
    """Matrix products, convolutions and attention."""
    return name in EXCLUDED or "attention" in name


@dataclass
class Tally:
    """Bytes and calls of each operator."""

    traffic: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    compute: int = 0
    # Bytes that matrix products read and write.
    products: int = 0

    @property
    def bytes(self) -> int:
        """Elementwise traffic."""
        return self.traffic.total()

    @property
    def launches(self) -> int:
        """Operators that are neither views nor allocations."""
        return self.calls.total() + self.compute


# What is counted operator by operator, as matrix products are apart.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "lora_linear": lora_linear._forward_impl,
    "lora_linear_backward": lora_linear._backward_impl,
    "lora_update": lora_linear._update_impl,
    "lora_update_backward": lora_linear._update_backward_impl,
}


# Told of each operator: its name, the bytes it moves, its arguments.
Observer = Callable[[str, int, tuple[Any, ...]], None]


class Traffic(TorchDispatchMode):
    """Adds up what operators read and write; `tally` may be replaced between forward and backward."""

    def __init__(self, observer: Observer | None = None) -> None:
        super().__init__()
        self.tally = Tally()
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        if space == "dgf" and name in IMPLEMENTATIONS:
            with self, mock.patch.object(lora_linear, "weight_gradient", weight_gradient):
                return IMPLEMENTATIONS[name](*args, **kwargs)
        out = func(*args, **kwargs)
        if space == "prim" or name in ALLOCATE:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if space in ("aten", "dgf_memory") and is_compute(name):
            self.tally.compute += 1
            if "attention" not in name:
                self.tally.products += sum(map(stored_bytes, (*inputs, *outputs)))
            return out
        storages = {t.untyped_storage()._cdata for t in inputs}
        if not func._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in outputs):
            return out
        read = [] if name in FILL else inputs[1:] if name in OVERWRITE else inputs
        moved = sum(map(stored_bytes, read)) + sum(map(stored_bytes, outputs))
        self.tally.traffic[f"{space}.{name}"] += moved
        self.tally.calls[f"{space}.{name}"] += 1
        if self.observer is not None:
            self.observer(f"{space}.{name}", moved, args)
        return out


class _Held:
    """One tensor, or what stands for it, in autograd's hands."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Saved:
    """Sees what autograd keeps, also inside other hooks: of those only the innermost are called."""

    def __init__(self) -> None:
        # In the order of the forward: of tensors that share a storage, the first one is told.
        self._held: list[weakref.ref[_Held]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks

    def _note(self, value: Any) -> _Held:
        held = _Held(value)
        self._held.append(weakref.ref(held))
        return held

    def _observed(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        return self._hooks(lambda tensor: self._note(pack(tensor)), lambda held: unpack(held.value))

    def __enter__(self) -> "Saved":
        self._patch = mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", self._observed)
        self._patch.start()
        self._outer = self._observed(lambda tensor: tensor, lambda tensor: tensor)
        self._outer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._outer.__exit__(*error)
        self._patch.stop()

    def tensors(self, tokens: set[int], known: list[Tensor]) -> list[Tensor]:
        """One tensor a storage of those that are still held, without the known and those without a token dimension."""
        gc.collect()
        seen = {t.untyped_storage()._cdata for t in known}
        found = []
        for reference in self._held:
            held = reference()
            tensor = None if held is None else held.value
            if not isinstance(tensor, Tensor) or not tokens & set(tensor.shape):
                continue
            if tensor.untyped_storage()._cdata not in seen:
                seen.add(tensor.untyped_storage()._cdata)
                found.append(tensor)
        return found


@dataclass(frozen=True)
class Counts:
    """Of one block, in bytes."""

    forward: Tally
    backward: Tally
    saved: int
    kept: list[tuple[tuple[int, ...], torch.dtype]]


def token_dimensions(configuration: Configuration) -> set[int]:
    """Sizes that a dimension of tokens has."""
    sizes = configuration.sizes
    whole = sizes.image + sizes.text
    found = {sizes.image, sizes.text, whole}
    return found | ({sizes.frame, sizes.image - sizes.frame, whole - sizes.frame} if sizes.frame else set())


def given(setup: Setup) -> list[Tensor]:
    """Tensors among the block's arguments, and the whole that two of them are parts of."""
    found = [t for t in tree_leaves(setup.arguments) if isinstance(t, Tensor)]
    return found if setup.whole is None else [*found, setup.whole]


def count(
    configuration: Configuration,
    recompute: str | None = None,
    frozen: bool = False,
    mode: str = "fast",
    observer: Observer | None = None,
    lora: int = 0,
) -> Counts:
    """Runs one block forward and backward on fake tensors; inside a FakeTensorMode.

    Args:
        configuration: the block.
        recompute: of `accelerate`; None leaves the block as it is.
        frozen: no gradients of parameters.
        mode: of `accelerate`.
        observer: told of each operator that is counted.
        lora: rank of LoRA layers in the block, or 0.
    """
    from dancegrpo_fast.patch import accelerate

    setup = configuration.make(frozen, lora)
    if recompute is not None:
        accelerate(setup.model, mode, recompute=recompute, trim_text=False)
    traffic = Traffic(observer)
    with CudaOperators(), traffic:
        with Saved() as saved:
            result = setup.block(**setup.arguments)
        outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
        known = [*setup.model.parameters(), *given(setup), *outputs]
        kept = saved.tensors(token_dimensions(configuration), known)
        total = sum(t.untyped_storage().nbytes() for t in kept)
        forward, traffic.tally = traffic.tally, Tally()
        asked = setup.asked
        if setup.whole is not None and recompute is not None:
            # The block took the whole, and so does the next one.
            base = outputs[0]._base
            assert base is not None
            outputs, asked = [base], [setup.whole, *asked[2:]]
        asked = [*asked, *(p for p in setup.block.parameters() if p.requires_grad)]
        grads = [torch.empty_like(t) for t in outputs]
        torch.autograd.grad(outputs, asked, grads)
    shapes = [(tuple(t.shape), t.dtype) for t in kept]
    return Counts(forward, traffic.tally, total, shapes)
