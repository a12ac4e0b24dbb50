"""What the parameters and results of step functions are, told by their names. Needs no torch."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OUTPUT = ("model_output", "noise_pred", "velocity")
STATE = ("latents", "sample")
NEXT = ("prev_sample", "next_latents")
STEP = ("index", "timestep")
AFTER = ("timestep_next",)
SIGMAS = ("sigmas",)
GENERATOR = ("generator",)
SELF = ("self",)
LOG_PROB = ("log_prob",)


class Layout:
    """The parameters of a function by place; a role that it lacks is None.

    `bind(*args, **kwargs)` gives the values in the order of `names`, defaults filled in, and raises Python's own
    TypeError.

    Raises:
        ValueError: no parameter is the model's output or the latents.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        signature = inspect.signature(function)
        self.names = tuple(signature.parameters)
        self.defaults = tuple(p.default for p in signature.parameters.values())
        self.bind = _binder(function.__name__, signature)
        self.output, self.state = self._required(OUTPUT), self._required(STATE)
        self.next = self._place(NEXT)
        kinds = [p.kind for p in signature.parameters.values()]
        self._named = next((i for i, kind in enumerate(kinds) if kind is inspect.Parameter.KEYWORD_ONLY), len(kinds))
        self.step, self.after, self.sigmas = self._place(STEP), self._place(AFTER), self._place(SIGMAS)
        self.generator, self.owner = self._place(GENERATOR), self._place(SELF)

    def call(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """`function` with values in the order of `names`."""
        named = zip(self.names[self._named :], values[self._named :], strict=True)
        return function(*values[: self._named], **dict(named))

    def _required(self, role: tuple[str, ...]) -> int:
        place = self._place(role)
        if place is None:
            raise ValueError(f"parameters: got {', '.join(self.names)}, want one of {', '.join(role)}")
        return place

    def _place(self, role: tuple[str, ...]) -> int | None:
        return next((place for place, name in enumerate(self.names) if name in role), None)


def _binder(name: str, signature: inspect.Signature) -> Callable[..., tuple[Any, ...]]:
    # Compiled, as `inspect.Signature.bind` takes longer than a whole step.
    defaults, parameters = {}, []
    for place, p in enumerate(signature.parameters.values()):
        default: Any = inspect.Parameter.empty
        if p.default is not inspect.Parameter.empty:
            defaults[f"_default_{place}"] = p.default
            default = _Name(f"_default_{place}")
        parameters.append(p.replace(annotation=inspect.Parameter.empty, default=default))
    written = inspect.Signature(parameters)
    values = "".join(f"{p}, " for p in signature.parameters)
    scope: dict[str, Any] = dict(defaults)
    exec(f"def {name}{written}:\n    return ({values})", scope)
    bind: Callable[..., tuple[Any, ...]] = scope[name]
    return bind


class _Name(str):
    """Written as it is."""

    def __repr__(self) -> str:
        return str(self)


def fields(found: Any) -> dict[str, Any] | None:
    """The named results of a function; None for a tuple or a single value."""
    if dataclasses.is_dataclass(found):
        return {f.name: getattr(found, f.name, None) for f in dataclasses.fields(found)}
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, (tuple, list)) or not hasattr(found, "__dict__") or hasattr(found, "dtype"):
        return None
    return dict(vars(found))


def outputs(found: Any) -> tuple[str, dict[str, Any]]:
    """Whether results are a tuple, have names or are a single value, and each under a name."""
    named = fields(found)
    if named is not None:
        return "fields", named
    if isinstance(found, (tuple, list)):
        return "tuple", {f"output {place}": value for place, value in enumerate(found)}
    return "value", {"output": found}


def next_latents(found: Any) -> Any:
    """The next latents among results: the first of a tuple, as in all known functions."""
    if isinstance(found, tuple):
        return found[0]
    named = fields(found)
    return None if named is None else next((named[name] for name in NEXT if name in named), None)


def log_prob(found: Any) -> Any:
    """The log-probability among results, `[B]`: the first of a tuple that has one dimension."""
    if isinstance(found, tuple):
        return next((value for value in found[1:] if getattr(value, "ndim", None) == 1), None)
    named = fields(found)
    return None if named is None else next((named[name] for name in LOG_PROB if name in named), None)
