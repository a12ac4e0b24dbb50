"""Whether ours does what an original does: both are called on small CPU tensors, and what they return is compared.

The tensors are made after those of a real call. Both sample from a seed and score a given next sample, at the first
two, an inner and the last step. The same have to be: what they return, how they leave the random state and the
scheduler, and the gradient with respect to the model's output.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .apart import Held, apart
from .roles import Layout, log_prob, next_latents, outputs
from .small import EPS, SEED, Setting, Small, Values

# Two float32 evaluations of one formula, whatever their order, stay far within so many times what a rounding of the
# inputs does to the original. Another formula, or a constant more or less, is off by a hundred times that.
ROUNDINGS = 32
Call = Callable[[Values], Any]


class Closest(NamedTuple):
    """The largest difference of a candidate, `inf` where there is something else than a number, in words."""

    size: float
    text: str
    target: str = ""


@dataclass
class Ran:
    """What one call gave and left behind."""

    kind: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    log_prob: str = ""
    next: Any = None
    state: Tensor | None = None
    drawn: list[Tensor] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""

    def label(self, name: str) -> str:
        """A result's name, and what it is."""
        if name in (self.log_prob, "output 0"):
            return f"{name} ({'log-probability' if name == self.log_prob else 'next latents'})"
        return name

    def forget(self, name: str) -> None:
        """Takes the value and the gradient of a result away, not that it is there."""
        if isinstance(self.found.get(name), Tensor):
            self.found[name] = torch.zeros_like(self.found[name])
        self.gradients.pop(name, None)


def compare(original: Callable[..., Any], ours: Call, layout: Layout, values: Values) -> Closest | None:
    """None where `ours` does what `original` does for calls like the one with `values`, else what differs most.

    Args:
        original: called with its own parameters.
        ours: called with the same values in one tuple.
        layout: of the original's parameters.
        values: of a real call; nothing of it is changed or read but what describes the schedule.
    """
    found: list[Closest] = []
    held = Held(original)
    try:
        small = Small(layout, values)
        apart(lambda: found.extend(_differences(lambda v: layout.call(original, v), ours, small)))
    except Exception as error:
        found.append(Closest(math.inf, f"it could not be tried: {type(error).__name__}: {error}"))
    changed = held.put_back()
    if changed:
        found.append(
            Closest(math.inf, f"it changes {', '.join(sorted(changed))}, which it does not own; ours does not")
        )
    return max(found, key=lambda difference: difference.size, default=None)


def distance(original: Callable[..., Any], ours: Call, layout: Layout, values: Values) -> float:
    """How far apart both are in the dtypes of the call: for a choice among several that do the same in float32.

    The largest difference of a result at an inner step, relative to the original's largest number.
    """
    found, small = [0.0], Small(layout, values)

    def work() -> None:
        for setting in list(small.settings())[:2]:
            plain, mine = (_run(c, small, setting, real=True) for c in (lambda v: layout.call(original, v), ours))
            for name in plain.found.keys() & mine.found.keys():
                theirs, value = plain.found[name], mine.found[name]
                if isinstance(theirs, Tensor) and isinstance(value, Tensor) and theirs.shape == value.shape:
                    off = (theirs.double() - value.double()).abs().nan_to_num(0.0, 0.0, 0.0).max()
                    found.append(float(off / theirs.double().abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=EPS)))

    apart(work)
    return max(found)


def _run(call: Call, small: Small, setting: Setting, seed: int = SEED, **how: Any) -> Ran:
    values, layout, ran = small.make(setting, **how), small.layout, Ran()
    output: Tensor = values[layout.output]
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach the random numbers of GPUs, too
    try:
        with torch.set_grad_enabled(setting.scored):
            output.requires_grad_(setting.scored)
            result = call(tuple(values))
    except BaseException as error:  # it may end the script, which is its own affair
        ran.error = f"{type(error).__name__}: {error}"
        return ran
    ran.kind, found = outputs(result)
    score, ran.next = log_prob(result), next_latents(result)
    for name, value in found.items():
        if score is not None and value is score:
            ran.log_prob = name
        if isinstance(value, Tensor) and value.requires_grad:
            weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(SEED)).to(value.dtype)
            total = (value * weights).sum()
            ran.gradients[name] = torch.autograd.grad(total, output, retain_graph=True, allow_unused=True)[0]
        ran.found[name] = value.detach() if isinstance(value, Tensor) else value
    ran.state = torch.get_rng_state()
    ran.given = {n: v.detach() for n, v in zip(layout.names, values, strict=True) if isinstance(v, Tensor)}
    generators = values[layout.generator] if setting.generator else []  # type: ignore[index]  # it has one
    ran.drawn = [g.get_state() for g in (generators if isinstance(generators, list) else [generators])]
    if layout.owner is not None:
        kinds = (bool, int, float, str, type(None))
        ran.attributes = {n: v for n, v in vars(values[layout.owner]).items() if isinstance(v, kinds)}
    return ran


def _differences(original: Call, ours: Call, small: Small) -> Iterator[Closest]:
    for setting in small.settings():
        plain = _run(original, small, setting)
        optional = setting.step in ("first", "second", "last") or (setting.generator and not small.given)
        if plain.error:
            if not optional:
                yield Closest(math.inf, f"{setting} the original raises {plain.error}")
            continue
        mine = _run(ours, small, setting)
        if mine.error:
            yield Closest(math.inf, f"{setting} ours raises {mine.error}")
            continue
        if _is_calm(original, mine, small, setting):
            plain.forget(mine.log_prob)
            mine.forget(mine.log_prob)
        shape = _shape_difference(plain, mine)
        if shape:
            yield Closest(math.inf, f"{setting} it {shape}")
            continue
        nudged = [_run(original, small, setting, nudge=nudge) for nudge in (1, -1)]
        for name, value in plain.found.items():
            yield from _apart(setting, mine.label(name), value, mine.found[name], [n.found.get(name) for n in nudged])
        for name, value in mine.gradients.items():
            label, shifted = f"the gradient of {mine.label(name)}", [n.gradients.get(name) for n in nudged]
            yield from _apart(setting, label, plain.gradients[name], value, shifted)
    if set(small.tensors.values()) != {torch.float32}:
        yield from _kinds_in_real_dtypes(original, ours, small)


def _kinds_in_real_dtypes(original: Call, ours: Call, small: Small) -> Iterator[Closest]:
    """Values are not compared: ours round less where the original computes in a low precision."""
    for setting in list(small.settings())[:2]:
        plain, mine = (_run(call, small, setting, real=True) for call in (original, ours))
        if plain.error:
            continue  # the CPU lacks something that another device has
        if not mine.error and _is_calm(original, mine, small, setting):
            plain.forget(mine.log_prob)
            mine.forget(mine.log_prob)
        shape = "" if mine.error else _shape_difference(plain, mine, wider=mine.log_prob)
        if mine.error or shape:
            dtypes = ", ".join(f"{small.layout.names[p]} in {d}" for p, d in small.tensors.items())
            yield Closest(
                math.inf, f"{setting} with {dtypes} {f'it {shape}' if shape else f'ours raises {mine.error}'}"
            )


def _is_calm(original: Call, mine: Ran, small: Small, setting: Setting) -> bool:
    """A step without noise, which ours scores 0, and which published code scores NaN, -inf or by the distance."""
    score = mine.found.get(mine.log_prob)
    if score is None or bool((score != 0).any()):
        return False
    sampled = [_run(original, small, replace(setting, scored=False, generator=False), seed) for seed in (1, 2)]
    return torch.equal(sampled[0].next, sampled[1].next)


def _shape_difference(plain: Ran, mine: Ran, wider: str = "") -> str:
    """What differs beside numbers, in words; the dtype of the output `wider` may be a wider one."""
    names = {name for name, value in mine.found.items() if value is not None}
    wanted = {name for name, value in plain.found.items() if value is not None}
    if plain.kind != mine.kind or names != wanted or not plain.found.keys() <= mine.found.keys():
        return f"gives {_listed(plain)}, ours {_listed(mine)}"
    for name in sorted(wanted):
        theirs, value = plain.found[name], mine.found[name]
        forms = [
            (type(v).__name__, tuple(v.shape), v.dtype) if isinstance(v, Tensor) else type(v) for v in (theirs, value)
        ]
        if isinstance(value, Tensor) and isinstance(theirs, Tensor) and name == wider:
            forms[0] = (*forms[0][:2], torch.promote_types(theirs.dtype, value.dtype))
        if forms[0] != forms[1]:
            return f"gives {name} as {forms[0]}, ours {forms[1]}"
    if mine.log_prob not in mine.gradients and plain.log_prob in plain.gradients:
        return f"gives {plain.log_prob} with a gradient, ours without"
    for name in mine.gradients:
        if name not in plain.gradients:
            return f"gives {name} without a gradient, ours with"
    if plain.state is None or mine.state is None or not torch.equal(plain.state, mine.state):
        return "leaves another state of torch's random numbers than ours"
    if not all(map(torch.equal, plain.drawn, mine.drawn)):
        return "leaves another state of the generator than ours"
    for name, value in plain.given.items():
        if not torch.equal(value, mine.given[name]):
            return f"changes {name} in place, ours does not"
    if plain.attributes != mine.attributes:
        changed = sorted(
            n for n in plain.attributes | mine.attributes if plain.attributes.get(n) != mine.attributes.get(n)
        )
        return f"leaves other values than ours in self.{changed[0]}"
    return ""


def _listed(ran: Ran) -> str:
    return f"{ran.kind} of {', '.join(f'{n}=None' if v is None else n for n, v in ran.found.items())}"


def _apart(setting: Setting, name: str, theirs: Any, ours: Any, nudged: list[Any]) -> Iterator[Closest]:
    """The difference of two results, where it is more than rounding."""
    if not isinstance(theirs, (Tensor, float, int)):
        if theirs != ours:
            yield Closest(math.inf, f"{setting} {name} is {theirs!r}, of ours {ours!r}")
        return
    plain, mine, *shifted = (torch.as_tensor(v).double() for v in (theirs, ours, *nudged))
    if not torch.equal(plain.isnan(), mine.isnan()) or not torch.equal(plain.isinf(), mine.isinf()):
        yield Closest(math.inf, f"{setting} {name} is finite in other places than of ours")
        return
    finite = plain.isfinite()
    if not bool(finite.any()):
        return
    moved = max(float((s - plain)[finite].abs().nan_to_num(0.0).max()) for s in shifted)
    allowed = ROUNDINGS * (moved + EPS * float(plain[finite].abs().max()))
    off = float((mine - plain)[finite].abs().max())
    if off > allowed:
        yield Closest(off, f"{setting} {name} is off by {off:.3g}, of which rounding explains {allowed:.1g}")
