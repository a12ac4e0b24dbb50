"""Recognises the step functions of known projects by name and signature, and puts ours in their place."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

Signature = tuple[tuple[str, Any], ...]


class Known(NamedTuple):
    """A function of ours, and how the one it replaces looks."""

    name: str
    owner: str | None
    signatures: tuple[Signature, ...]
    ours: Callable[..., Any]

    @property
    def target(self) -> str:
        """The dotted name of ours."""
        return f"{self.ours.__module__}.{self.ours.__qualname__}"


class Replacement(NamedTuple):
    """Where a function was, its name, and the dotted name of what stands there now."""

    module: str
    function: str
    by: str


# Module, class or None, function, and how many last parameters older versions of the project lack.
_OURS = (
    ("dancegrpo", None, "flux_step", (0,)),
    ("ddpo", None, "ddim_step_with_logprob", (0,)),
    ("flow_grpo", None, "sde_step_with_logprob", (0, 2)),
    ("mixgrpo", None, "flow_grpo_step", (0,)),
    ("mixgrpo", None, "dance_grpo_step", (0,)),
    ("pref_grpo", None, "flow_grpo_step", (0,)),
    ("pref_grpo", None, "dance_grpo_step", (0,)),
    ("verl_omni", "FlowMatchSDEDiscreteScheduler", "sample_previous_step", (0, 1)),
    ("flow_factory", "FlowMatchEulerDiscreteSDEScheduler", "step", (0,)),
)


@functools.cache
def known() -> tuple[Known, ...]:
    """Every function that can be replaced."""
    found = []
    for module, owner, name, missing in _OURS:
        home = importlib.import_module(f".{module}", __package__)
        ours = getattr(home if owner is None else getattr(home, owner), name)
        full = tuple(pair for pair in signature(ours) if pair[0] not in ("rounding", "backend"))
        found.append(Known(name, owner, tuple(full[: len(full) - k] for k in missing), ours))
    return tuple(found)


def signature(function: Callable[..., Any]) -> Signature:
    """Names and defaults of the parameters; one without a default has `inspect.Parameter.empty`."""
    return tuple((p.name, p.default) for p in inspect.signature(function).parameters.values())


def written(name: str, parameters: Signature) -> str:
    """A signature as one writes it."""
    return f"{name}({', '.join(p if d is inspect.Parameter.empty else f'{p}={d!r}' for p, d in parameters)})"


def sought() -> str:
    """All names and signatures that are recognised."""
    return "\n".join(
        f"  {'' if k.owner is None else k.owner + '.'}{written(k.name, s)}" for k in known() for s in k.signatures
    )


def recognise(name: str, owner: str | None, parameters: Signature, where: str) -> Known | None:
    """The known function of this name and signature; None where the name is not known.

    Raises:
        ValueError: the name is known, the signature is not.
    """
    named = [k for k in known() if (k.name, k.owner) == (name, owner)]
    for candidate in named:
        if parameters in candidate.signatures:
            return candidate
    if named:
        wanted = " or ".join(written(name, s) for k in named for s in k.signatures)
        raise ValueError(f"{where}: got {written(name, parameters)}, want {wanted}")
    return None


def bound(function: Known, original: Any, rounding: str, backend: str) -> Callable[..., Any]:
    """Ours under the original's name, with the settings filled in."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return function.ours(*args, rounding=rounding, backend=backend, **kwargs)

    return replaced


def _found_in(module: ModuleType) -> Iterator[tuple[Any, Any, Known]]:
    """Recognised functions of a module: where each lives (None or its class), itself, and ours."""
    for value in list(vars(module).values()):
        if not (inspect.isfunction(value) or inspect.isclass(value)) or value.__module__.startswith(f"{__package__}."):
            continue
        if inspect.isfunction(value):
            where = f"{value.__module__}.{value.__qualname__}"
            match = recognise(value.__name__, None, signature(value), where)
            if match is not None:
                yield None, value, match
        else:
            for name in {k.name for k in known() if k.owner == value.__name__} & vars(value).keys():
                method = vars(value)[name]
                where = f"{value.__module__}.{value.__qualname__}"
                match = recognise(name, value.__name__, signature(method), where)
                if match is not None:
                    yield value, method, match


@contextmanager
def patched(
    module_or_modules: ModuleType | Iterable[ModuleType], *, rounding: str = "exact", backend: str = "auto"
) -> Iterator[list[Replacement]]:
    """Replaces the step functions of known projects, everywhere they were imported to, until the context ends.

    A function is recognised by its name and signature in one of the modules; then every module that holds the same
    object gets ours. References elsewhere (in a list, a closure, a `functools.partial`) are not found. Methods of the
    known schedulers are replaced on their class.

    Args:
        module_or_modules: where to look.
        rounding: "exact", or "reference" for the roundings of the published code.
        backend: as for `transition_step`.

    Yields:
        What was replaced, one entry for each place.

    Raises:
        ValueError: nothing was recognised, or a known name has an unknown signature.
    """
    modules = [module_or_modules] if isinstance(module_or_modules, ModuleType) else list(module_or_modules)
    targets = {id(original): (home, original, match) for m in modules for home, original, match in _found_in(m)}
    if not targets:
        names = ", ".join(m.__name__ for m in modules)
        raise ValueError(f"module_or_modules: got {names} with none of these functions:\n{sought()}")
    undo: list[tuple[Any, str, Any]] = []
    done: list[Replacement] = []
    try:
        for home, original, match in targets.values():
            ours = bound(match, original, rounding, backend)
            if home is not None:
                undo.append((home, match.name, original))
                setattr(home, match.name, ours)
                done.append(Replacement(home.__module__, f"{home.__qualname__}.{match.name}", match.target))
                continue
            for module in {id(m): m for m in (*modules, *list(sys.modules.values()))}.values():
                for name, value in list(getattr(module, "__dict__", {}).items()):
                    if value is original:
                        undo.append((module, name, original))
                        setattr(module, name, ours)
                        done.append(Replacement(module.__name__, name, match.target))
        yield done
    finally:
        for place, name, original in reversed(undo):
            setattr(place, name, original)
