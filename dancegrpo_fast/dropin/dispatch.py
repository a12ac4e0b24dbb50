"""Where the calls of one replaced function go: to ours where it does what the original does, else to the original."""

import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .known import Known, candidates, misfit
from .meter import Meter
from .probe import Closest, compare, distance
from .roles import Layout
from .settings import inside

if TYPE_CHECKING:
    from .replaced import Definition

# Each is a way in which a script calls a function; a script that has more of them gets the original for the rest.
_MAX_KEYS = 32
_CHOICES = frozenset({bool, str, type(None)})
_HELD = frozenset({bool, str, float})
_NO_TENSORS = "arguments that are no tensors"
_SHAPES = "latents and a model output of two shapes"
_GRAPH = "latents or a sample to be differentiated through; ours is for sampling without gradients"
Values = tuple[Any, ...]


class Verdict(NamedTuple):
    """Who takes calls of one kind: `ours` by the values of the original's parameters, or None and why."""

    known: Known | None
    ours: Callable[[Values], Any] | None
    why: str = ""


class Dispatch:
    """One function's calls: bound, sent on, counted."""

    def __init__(self, definition: "Definition") -> None:
        self.definition, self.replacements = definition, definition.replacements
        self.original = definition.function
        self.meter = Meter(lambda values: self.layout.call(self.original, values))
        self.taken: list[Known] = []
        self.kept: dict[str, int] = {}
        known = candidates(self.original.__name__, definition.owner)
        parameters = list(inspect.signature(self.original).parameters.values())
        found = [(k, misfit(k, parameters)) for k in known]
        self.misfits = [(k, why) for k, why in found if why is not None]
        self.fitting = [k for k, why in found if why is None]

    def entry(self) -> Callable[[Values, dict[str, Any]], Any]:
        """What takes the calls; compiled code calls it as it is, from outside of its graphs."""
        if not self.fitting:
            self._refuse(unfit(self.original, self.misfits))
            return lambda args, kwargs: self._keep("its parameters", args, kwargs)
        self.layout = Layout(self.original)
        lacking = {n for k in self.fitting for n in self.layout.names if n not in self._wanted(k)}
        roles = {self.layout.output, self.layout.state, self.layout.next, self.layout.sigmas, self.layout.generator}
        self.formed = [p for p in (self.layout.step, self.layout.after) if p is not None]
        other = {*roles, *self.formed, self.layout.owner}
        self.keyed = [p for p in range(len(self.layout.names)) if p not in other]
        self.extra = [p for p, n in enumerate(self.layout.names) if n in lacking]
        self.verdicts: dict[Any, Verdict] = {}
        self.configs: dict[int, tuple[Any, int]] = {}
        self.numbers: dict[Values, int] = {}
        entry: Callable[..., Any] = torch.compiler.disable(self.dispatch)
        return entry

    def dispatch(self, args: Values, kwargs: dict[str, Any]) -> Any:
        """One call."""
        if getattr(inside, "on", False):
            return self.original(*args, **kwargs)
        values = self.layout.bind(*args, **kwargs)
        verdict = self.verdicts.get(self.key(values)) or self._decide(values)
        layout = self.layout
        replay = layout.next is not None and values[layout.next] is not None
        if verdict.ours is None:
            found = self._keep(verdict.why, args, kwargs)
        else:
            try:
                found = self.meter.run(verdict.ours, values, replay)
            except Exception as error:
                found = self._failed(error, values, args, kwargs)
        audit = self.replacements.audit
        if audit is not None and audit.open:
            audit.saw(layout, values, replay, found)
        return found

    def key(self, values: Values) -> Values:
        """What a verdict holds for: every choice among behaviours, but no amount. Takes part in every call's time."""
        layout = self.layout
        state, output = values[layout.state], values[layout.output]
        if not isinstance(state, Tensor) or not isinstance(output, Tensor):
            return (_NO_TENSORS,)
        found = [self._beyond(values), state.ndim, state.dtype, output.dtype]
        for place in self.keyed:
            value = values[place]
            found.append(value if value.__class__ in _CHOICES else _kind(value))
        for place in self.formed:
            value = values[place]
            found.append((value.ndim, value.is_floating_point()) if isinstance(value, Tensor) else value.__class__)
        for place in self.extra:
            found.append(_is_default(values[place], layout.defaults[place]))
        if layout.generator is not None:
            found.append(values[layout.generator].__class__ is list)
        if layout.owner is not None:
            found += self._choices(values[layout.owner])
        return tuple(found)

    def _beyond(self, values: Values) -> str:
        """What of a call is outside of what ours do, whatever the original is; "" if nothing."""
        layout = self.layout
        state, output = values[layout.state], values[layout.output]
        if state.shape != output.shape:
            return _SHAPES
        if torch.is_grad_enabled():
            draws = layout.next is not None and values[layout.next] is None
            if state.requires_grad or (draws and output.requires_grad):
                return _GRAPH
        return ""

    def _choices(self, owner: Any) -> list[Any]:
        """Those that a scheduler holds: flags, names, whether a number is 0; and its configuration."""
        attributes = getattr(owner, "__dict__", {})
        held = [(v.__class__, v) for v in attributes.values() if v.__class__ in _HELD]
        chosen: list[Any] = [not v if kind is float else v for kind, v in held]
        chosen.append(owner.__class__)
        config = attributes.get("_internal_dict")  # of diffusers' schedulers, replaced as a whole when it changes
        if config is not None:
            known = self.configs.get(id(config))
            if known is None:
                if len(self.configs) >= _MAX_KEYS:
                    self.configs.clear()
                picked = tuple((n, v) for n, v in dict(config).items() if v.__class__ in _CHOICES)
                # A number for each, as a long tuple takes long to look up.
                known = self.configs[id(config)] = config, self.numbers.setdefault(picked, len(self.numbers))
            chosen.append(known[1])
        return chosen

    def _decide(self, values: Values) -> Verdict:
        with self.replacements.lock:
            key = self.key(values)
            if key not in self.verdicts:
                if len(self.verdicts) >= _MAX_KEYS:
                    self.verdicts.setdefault("many", Verdict(None, None, f"more than {_MAX_KEYS} ways of calling it"))
                    self._refuse(f"called in more than {_MAX_KEYS} ways")
                    return self.verdicts["many"]
                self.verdicts[key] = self._judge(values)
            return self.verdicts[key]

    def _judge(self, values: Values) -> Verdict:
        layout = self.layout
        beyond = self.key(values)[0]
        if beyond:
            self._refuse(f"called with {beyond}{self._elsewhere}")
            return Verdict(None, None, f"called with {beyond}")
        given = {p for p in self.extra if not _is_default(values[p], layout.defaults[p])}
        able = [k for k in self.fitting if {layout.names[p] for p in given} <= self._wanted(k)]
        if not able:
            names = ", ".join(sorted(f"{layout.names[p]}={_shown(values[p])}" for p in given))
            self._refuse(f"called with {names}, which {self.fitting[0].target} lacks{self._elsewhere}")
            return Verdict(None, None, f"called with {names}")
        able.sort(key=lambda k: k not in self.taken)
        closest: Closest | None = None
        equal: list[Known] = []
        several = {values[p].dtype for p in (layout.state, layout.output)} != {torch.float32}
        for known in able:
            found = compare(self.original, self._bound(known, trial=True), layout, values)
            if found is None:
                equal.append(known)
                # Generations that differ in what they round are the same in float32.
                if several:
                    continue
                break
            found = found._replace(target=known.target)
            closest = found if closest is None or found.size < closest.size else closest
        if len(equal) > 1:
            equal.sort(key=lambda k: distance(self.original, self._bound(k, trial=True), layout, values))
        if equal:
            return self._take(equal[0])
        assert closest is not None
        self._refuse(f"closest is {closest.target}: {closest.text}")
        return Verdict(None, None, closest.text)

    def _take(self, known: Known) -> Verdict:
        if known not in self.taken:
            self.taken.append(known)
            self.replacements.say(f"{self._name} -> {known.target} ({known.about})")
        return Verdict(known, self._bound(known))

    def _bound(self, known: Known, trial: bool = False) -> Callable[[Values], Any]:
        """Ours, called with the values of the original's parameters."""
        ours, settings = known.load(), self.replacements.settings
        wanted = self._wanted(known)
        places = [p for p, n in enumerate(self.layout.names) if n in wanted]
        names = [self.layout.names[p] for p in places]
        pick = itemgetter(*places)
        how: dict[str, Any] = {"rounding": settings.rounding, "backend": settings.backend, **known.options}
        if trial:
            how["backend"] = "auto"  # on the CPU
        elif settings.latents is not None:
            how["latents_dtype"] = getattr(torch, settings.latents)

        def call(values: Values) -> Any:
            return ours(**dict(zip(names, pick(values), strict=True)), **how)

        return call

    @staticmethod
    def _wanted(known: Known) -> set[str]:
        return set(inspect.signature(known.load()).parameters) - known.options.keys()

    @property
    def _name(self) -> str:
        return f"{self.definition.where} {self.definition.label}"

    @property
    def _elsewhere(self) -> str:
        return "" if self.replacements.strict else "; such calls go to the original"

    def _refuse(self, why: str) -> None:
        latents = "" if self.replacements.settings.latents is None else "; --latents does nothing for it"
        self.replacements.refuse(f"{self._name}: not replaced: {why}{latents}")

    def _keep(self, why: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.kept[why] = self.kept.get(why, 0) + 1
        return self.original(*args, **kwargs)

    def _failed(self, error: Exception, values: Values, args: Values, kwargs: dict[str, Any]) -> Any:
        """The original instead: what it raises is the script's own; what it does not is said, and not tried again."""
        # Others are not ours: a checkpoint stops what it computes again by one, and memory may be out.
        if self.replacements.strict or type(error).__module__ != "builtins":
            raise error
        found = self._keep("an error of ours", args, kwargs)
        self._refuse(f"ours raised {type(error).__name__}: {error}")
        self.verdicts[self.key(values)] = Verdict(None, None, f"{type(error).__name__}: {error}")
        return found


def _kind(value: Any) -> Any:
    """What counts of an argument that is no choice itself: of a number, whether it is 0."""
    kind = value.__class__
    if kind is float or kind is int:
        return kind if value else (kind, 0)
    if kind is list or kind is tuple:
        return tuple([v if v.__class__ in _CHOICES else _kind(v) for v in value])
    return (Tensor, value.ndim, value.is_floating_point()) if isinstance(value, Tensor) else kind


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) in (bool, int, float, str, tuple, list) and bool(value == default))


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Tensor) else repr(value)


def unfit(function: Callable[..., Any], misfits: Sequence[tuple[Known, str]]) -> str:
    """Why none of ours can be called as `function` is."""
    written = f"{function.__name__}{inspect.signature(function)}"
    return f"got {written}; " + "; ".join(f"as {known.target} it {why}" for known, why in misfits)
