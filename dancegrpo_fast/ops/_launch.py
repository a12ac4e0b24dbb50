"""Launches of Triton kernels: through its own launcher once, and from then on by what that found."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from .. import backends
from ._library import MOST_KEPT, QUIET, layout


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """One launch on the current stream of the current device; returns the compiled kernel."""
    return kernel[(programs,)](*arguments, **settings)


def launch_on(
    device: torch.device, kernel: Any, programs: int, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    """One launch on the device, which `planned` keeps."""
    settings = _settled(settings)
    with _on(device):
        compiled = launch(kernel, programs, _plain(arguments), settings)
    recorder = _get_current_dispatch_mode()
    if isinstance(recorder, _Recorder):
        recorder.launches.append((kernel, programs, arguments, settings, compiled))


def _settled(settings: dict[str, Any]) -> dict[str, Any]:
    # Noise, ratio 1 and the equality with the CPU kernels need every product rounded.
    return {**settings, "interpreted": backends.interpreting(), "enable_fp_fusion": False}


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return contextlib.nullcontext()


class Varying(int):
    """A number that may differ from call to call, of an argument whose value Triton does not look at."""


def _plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([int(one) if type(one) is Varying else one for one in arguments])


class _Recorder(TorchDispatchMode):
    """What a function launches and allocates, and whether it computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, int, tuple[Any, ...], dict[str, Any], Any]] = []
        self.rooms: list[Tensor] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.rooms.append(found)
        elif not func.is_view:
            self.computes = True
        return found


class _Place(int):
    """Where a value stands among those of a call."""


class _Inside(NamedTuple):
    """Where a tensor begins, in bytes behind the beginning of one of a call's."""

    place: int
    offset: int


class _Bound:
    """Launches whose tensors, and numbers that vary, alone differ from call to call, in the order of a call's."""

    def __init__(self, recorded: _Recorder, values: list[Any]):
        self.rooms = [(room.shape, room.dtype, room.device) for room in recorded.rooms]
        self._values = [*values, *recorded.rooms]
        self._tensors = [(i, t) for i, t in enumerate(self._values) if isinstance(t, Tensor)]
        self._exact = {(t.data_ptr(), t.dtype): i for i, t in self._tensors}
        self._numbers = {id(n): i for i, n in enumerate(self._values) if type(n) is Varying}
        # Copies are new in each call.
        self.whole = not recorded.computes
        self.launches = [self._launch(*one) for one in recorded.launches]
        del self._values, self._tensors, self._exact, self._numbers

    def _launch(self, kernel: Any, programs: int, arguments: tuple[Any, ...], settings: Any, compiled: Any) -> Any:
        if compiled is None:
            self.whole = False
            return None
        constants = tuple(settings.get(name) for name in kernel.arg_names[len(arguments) :])
        return compiled[(programs, 1, 1)], self._template(arguments), constants

    def _template(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        found: list[Any] = []
        for one in arguments:
            if isinstance(one, Tensor):
                place = self._exact.get((one.data_ptr(), one.dtype))
                found.append(self._inside(one) if place is None else _Place(place))
            elif isinstance(one, tuple):
                found.append(self._template(one))
            else:
                found.append(_Place(self._numbers[id(one)]) if type(one) is Varying else one)
        return tuple(found)

    def _inside(self, part: Tensor) -> _Inside | None:
        storage = part.untyped_storage().data_ptr()
        around = [i for i, t in self._tensors if t.untyped_storage().data_ptr() == storage]
        if len(around) != 1:
            self.whole = False
            return None
        return _Inside(around[0], part.data_ptr() - self._values[around[0]].data_ptr())

    def __call__(self, values: list[Any]) -> None:
        for shape, dtype, device in self.rooms:
            values.append(torch.empty(shape, dtype=dtype, device=device))
        for run, template, constants in self.launches:
            run(*_filled(template, values), *constants)


def _filled(template: tuple[Any, ...], values: Sequence[Any]) -> tuple[Any, ...]:
    found: list[Any] = []
    for one in template:
        kind = type(one)
        if kind is tuple:
            one = _filled(one, values)
        elif kind is _Place:
            one = values[one]
        elif kind is _Inside:
            one = values[one.place].data_ptr() + one.offset
        found.append(one)
    return tuple(found)


# By the function that launches, and by layouts.
_bound: dict[Any, "_Bound"] = {}


def planned(function: Callable[..., None]) -> Callable[..., None]:
    """`function` launches kernels for tensors and settings; what it launches is kept by the tensors' layouts.

    Triton's own launcher asks every argument in every call, which takes longer than most of these kernels. Nothing is
    kept of a function that computes something by torch beside its launches, such as a copy.
    """

    def run(*arguments: Any) -> None:
        values: list[Any] = []
        key = function, _collected(arguments, values, {})
        known = _bound.get(key)
        if known is not None:
            with _on(values[0].device):
                known(values)
            return
        # AMD's launches depend on more than the layouts.
        if torch.version.hip is not None or backends.interpreting():
            function(*arguments)
            return
        recorder = _Recorder()
        with recorder:
            function(*arguments)
        made = _Bound(recorder, values)
        if made.whole:
            if len(_bound) >= MOST_KEPT:
                _bound.clear()
            _bound[key] = made

    return run


def _collected(arguments: Iterable[Any], values: list[Any], places: dict[int, int]) -> tuple[Any, ...]:
    """A key of all that launches depend on: layouts, alignment, which tensors lie at one place, and settings.

    Tensors, and numbers that vary, are put into the list; `places` are those of addresses in it.
    """
    found: list[Any] = []
    for one in arguments:
        kind = type(one)
        # Of what is no tensor, `isinstance` asks a metaclass.
        if kind in QUIET:
            found.append(one)
        elif kind is Varying:
            values.append(one)
            found.append(Varying)
        elif isinstance(one, Tensor):
            address = one.data_ptr()
            found.append((layout(one), address % 16 == 0, places.setdefault(address, len(values))))
            values.append(one)
        elif isinstance(one, (tuple, list)):
            found.append(_collected(one, values, places))
        else:
            found.append(one)
    return tuple(found)
