"""Tensors without memory, and what torch's operators make of them."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


class Fake(Tensor):
    """A tensor that says it is on the CPU, over one on the `meta` device: torch's own fakes take longer.

    Attributes:
        meta: of the same storage, for `Fakes` to compute with.
    """

    meta: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func}: got a fake tensor outside of the section that made it")

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # a tensor's is written nowhere
        """What it says."""
        return CPU

    def __repr__(self, **_: object) -> str:  # type: ignore[override]  # a tensor's has numbers to print
        return f"Fake({tuple(self.shape)}, {self.dtype})"


def fake(meta: Tensor) -> Fake:
    """One over a tensor on the `meta` device."""
    make: Any = Tensor._make_subclass
    found: Fake = make(Fake, meta, False, dispatch_device=True, device_for_backend_keys=CPU)
    found.meta = meta
    return found


class Like(NamedTuple):
    """What a tensor is, without its memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operator(NamedTuple):
    """What a result of an overload depends on: whether it is told a device, and makes new tensors whatever comes."""

    makes: bool
    pure: bool


@cache
def _operator(func: Any) -> Operator:
    schema = func._schema
    aliases = any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))
    return Operator(any(argument.name == "device" for argument in schema.arguments), not aliases)


# Results by operator and arguments: most of the meta kernels are Python, and models repeat themselves.
_results: dict[Any, Any] = {}


class Fakes(TorchDispatchMode):
    """Inside, what is computed of fake tensors is fake, and so is all that is made of nothing.

    Args:
        cuda: results are as CUDA's operators give them, or as a CPU's.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and torch's guard against it costs more than a call.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CPU
        kwargs = kwargs or {}
        known = _operator(func)
        given: dict[int, Fake] = {}
        real: list[Tensor] = []
        inner = _inner(args, given, real)
        more = {name: _inner(value, given, real) for name, value in kwargs.items()}
        if not given and (real or not known.makes):
            # Constants, which a model may ask for their numbers.
            return func(*args, **kwargs)
        if known.makes:
            more["device"] = "meta"
        if not known.pure:
            return _outer(func(*inner, **more), given)
        key = func, self.cuda, torch.get_default_dtype(), _key(inner), _key(tuple(more.items()))
        if key not in _results:
            found = func(*inner, **more)
            if func is torch.ops.aten.native_layer_norm.default and not self.cuda:
                # Meta kernels are CUDA's, whose statistics are float32.
                found = found[0], *(each.to(inner[0].dtype) for each in found[1:])
            if not _are_new(found, [fake.meta for fake in given.values()]):
                return _outer(found, given)
            _results[key] = _likes(found)
        return _made(_results[key])


def _key(value: Any) -> Any:
    """Of arguments: tensors by what they are."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value


def _are_new(value: Any, given: Sequence[Tensor]) -> bool:
    """Whether a result is whole tensors with storages of their own, as `Like` makes them."""
    made = [tensor for tensor in tree_leaves(value) if isinstance(tensor, Tensor)]
    storages = {tensor.untyped_storage()._cdata for tensor in (*given, *made)}
    return len(storages) == len({t.untyped_storage()._cdata for t in given}) + len(made) and all(
        t.untyped_storage().nbytes() == torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").nbytes
        for t in made
    )


def _likes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(value.shape, value.stride(), value.dtype)
    return type(value)(map(_likes, value)) if isinstance(value, (list, tuple)) else value


def _made(value: Any) -> Any:
    if isinstance(value, Like):
        return fake(torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta"))
    return type(value)(map(_made, value)) if isinstance(value, (list, tuple)) else value


def _inner(value: Any, given: dict[int, Fake], real: list[Tensor]) -> Any:
    """With the tensors below fake ones, which go into `given`, and others', which go into `real`."""
    if isinstance(value, Fake):
        given[id(value.meta)] = value
        return value.meta
    if isinstance(value, Tensor) and value.is_meta:
        # Among what a model keeps out of sight, in lists.
        given[id(value)] = fake(value)
        return value
    if isinstance(value, Tensor):
        real.append(value)
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_inner(each, given, real) for each in value)
    return value


def _outer(value: Any, given: Mapping[int, Fake]) -> Any:
    """With fake tensors over those on the `meta` device, which are the ones that were given where it is them."""
    if isinstance(value, Tensor):
        return given[id(value)] if id(value) in given else fake(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_outer(each, given) for each in value)
    return value
