"""`torch.ops.dgf`: how an op is defined, and when a call goes through it."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

_LIBRARY = torch.library.Library("dgf", "DEF")
# Classes of arguments that see no operator.
PLAIN = {Tensor, torch.nn.Parameter}
QUIET = {type(None), bool, int, float, str, torch.dtype}
Result = TypeVar("Result")


def register(schema: str, implementation: Callable[..., Result], fake: Callable[..., Any]) -> Callable[..., Result]:
    """Defines one op for the CPU and CUDA; `fake` gives the shapes.

    Both may leave results out as None, which a registered op returns as empty tensors.

    Returns what to call in the op's place: the op where something watches, else its implementation at once, as torch's
    dispatcher costs more than all the rest of a small call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _whole(implementation), "CPU")
    _LIBRARY.impl(name, _whole(implementation), "CUDA")
    torch.library.register_fake(f"dgf::{name}", _whole(fake), lib=_LIBRARY)
    op = getattr(torch.ops.dgf, name).default

    def call(*arguments: Any) -> Result:
        found: Result = (op if watched(arguments) else implementation)(*arguments)
        return found

    return call


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an empty tensor, like its first one, for each None that it returns."""

    @wraps(function)
    def whole(*arguments: Any) -> Any:
        found = function(*arguments)
        if isinstance(found, Tensor) or all(one is not None for one in found):
            return found
        like = next(one for one in arguments if isinstance(one, Tensor))
        return tuple(like.new_empty(0) if one is None else one for one in found)

    return whole


def layout(one: Tensor) -> tuple[Any, ...]:
    """What a call depends on of a strided tensor, but for its numbers."""
    return one.dtype, one.device, one.shape, one.stride()


_UNKNOWN = object()
# Signatures that are kept; a run has few.
MOST_KEPT = 4096


def checked_once(check: Callable[..., Result]) -> Callable[..., Result]:
    """`check` looks at layouts and settings alone: what it found is kept by them, unless it raises."""
    passed: dict[Any, Any] = {}

    def run(*arguments: Any) -> Result:
        key = None if torch.compiler.is_compiling() else _signature(arguments)
        if key is None:
            return check(*arguments)
        found = passed.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            found = check(*arguments)
            if len(passed) >= MOST_KEPT:
                passed.clear()
            passed[key] = found
        result: Result = found
        return result

    return run


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of a call: of gradients, or of tangents; or a compiler that decides that itself."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def linked(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`, below its Python part where nothing watches: that part looks for tensors of past transforms."""
    if modes_watch():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]  # of the C base class


def _signature(arguments: Iterable[Any]) -> tuple[Any, ...] | None:
    """None where an argument has to be looked at more closely."""
    found: list[Any] = []
    for one in arguments:
        kind = type(one)
        if kind in PLAIN and one.layout is torch.strided:
            found.append(layout(one))
        elif kind in QUIET:
            # 1, 1.0 and True are equal.
            found += kind, one
        else:
            return None
    return tuple(found)


def watched(arguments: Iterable[Any]) -> bool:
    """Whether something has to see an operator: what `modes_watch` finds, or tensors of another class."""
    if modes_watch():
        return True
    for one in arguments:
        kind = type(one)
        if kind in QUIET:
            continue
        if kind in PLAIN:
            if one.is_meta or is_lazy(one):
                return True
        elif kind is not list or watched(one):
            return True
    return False


def is_lazy(one: Tensor) -> bool:
    """Whether torch's dispatcher would first write out a negation, zeros, or what a past transform has wrapped."""
    return one.is_neg() or one._is_zerotensor() or _wrapped(one)


# torch has no public way to ask for these.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_transform = torch._C._functorch.peek_interpreter_stack
_profiled = torch._C._autograd._profiler_enabled
_traced = torch._C._is_tracing


def modes_watch() -> bool:
    """Whether a graph in the making, a mode (checkpoint policies, FLOP counters), a transform or a profiler does."""
    return bool(
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or _profiled()
        or _traced()
    )
