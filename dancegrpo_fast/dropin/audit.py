"""Whether a script's first update starts where it should: replays score what was drawn, and the ratio is 1.

In the step loop everything stays on its device: a fingerprint of each sample's latents, and its log-probability. They
are read when an optimiser is about to step for the first time after a replay, or at the end.
"""

import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .roles import Layout, log_prob, next_latents
from .verdict import Pair, judge

# Calls that are remembered; one takes some dozen bytes a sample. What came before is forgotten, and that is said.
_MAX_CALLS = 4096
# Noise of another trajectory is as far away as it is long; what a script changes between two steps is less.
_NEAR = 0.5
_ROUNDED = (torch.bfloat16, torch.float16)
_HASH = 0x9E3779B1 - 2**32


class Call(NamedTuple):
    """A call: fingerprints `[B]` of the latents, the next ones and the model's output, and the score.

    Of a rollout also the roundings of the next latents, and how far, relative to what the call before returned, the
    latents are from it.
    """

    start: Tensor
    after: Tensor
    output: Tensor
    score: Tensor | None
    how: dict[str, str]
    rounded: dict[torch.dtype, Tensor]
    apart: Tensor | None


@dataclass
class Fingerprints:
    """Sums of a tensor's bits by sample, the same in every batch, layout and float dtype that holds its numbers."""

    patterns: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def __call__(self, values: Tensor) -> Tensor:
        """int64 `[B]`, on the device of `values`."""
        flat = values.detach().flatten(1).float() + 0.0  # one zero, not two
        key = flat.shape[1], flat.device
        if key not in self.patterns:
            places = torch.arange(key[0], dtype=torch.int32, device=key[1])
            self.patterns[key] = places * _HASH | 1
        # Integer sums do not depend on their order, as float sums of other batches do.
        return (flat.view(torch.int32) * self.patterns[key]).sum(dim=1, dtype=torch.int64)


class Audit:
    """Watches the calls of all replaced functions up to the first update.

    Args:
        say: takes what it finds.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.open, self.trouble, self.forgotten = True, "", 0
        self._say = say
        self._calls: deque[Call] = deque(maxlen=_MAX_CALLS)
        self._replays: list[Call] = []
        self._fingerprints = Fingerprints()
        self._last: tuple[Tensor, int | None, Call] | None = None
        self._found: dict[str, Any] | None = None
        # It stays: an optimiser goes through its hooks while it is called, and would see one that goes.
        register_optimizer_step_pre_hook(_Hook(self))

    def saw(self, layout: Layout, values: Sequence[Any], replay: bool, found: Any) -> None:
        """Takes note of a call; reads nothing from its device."""
        state, output = values[layout.state], values[layout.output]
        score = log_prob(found)
        after = values[layout.next] if replay else next_latents(found)  # type: ignore[index]  # a replay gives one
        tensors = [t for t in (state, output, after, score) if t is not None]
        if after is None or any(type(t) is not Tensor for t in tensors) or after.shape != state.shape or state.ndim < 2:
            return
        if score is not None and score.shape != state.shape[:1]:
            return
        try:
            with torch.no_grad():
                if not replay:
                    self._rollout(state, output, after, score)
                elif score is not None and score.requires_grad:
                    self._replay(state, output, after, score)
        except Exception as error:  # the script goes on, without the audit
            self._stop(f"it stopped at {type(error).__name__}: {error}")

    def _rollout(self, state: Tensor, output: Tensor, after: Tensor, score: Tensor | None) -> None:
        if self._replays:
            # No optimiser of torch's stepped: what comes now belongs to a later update.
            self.open = False
            return
        start, apart = None, None
        if self._last is not None:
            before, version, call = self._last
            if state is before and version is not None and version == state._version:
                start = call.after
            elif state.shape == before.shape and state.device == before.device:
                off = (state.float() - before.float()).flatten(1).norm(dim=1)
                apart = off / before.float().flatten(1).norm(dim=1)
        if len(self._calls) == _MAX_CALLS:
            self.forgotten += 1
        wide = after.dtype in (torch.float32, torch.float64)
        call = Call(
            self._fingerprints(state) if start is None else start,
            self._fingerprints(after),
            self._fingerprints(output),
            None if score is None else score.detach().clone(),
            _how(state, output),
            {dtype: self._fingerprints(after.to(dtype)) for dtype in _ROUNDED if wide},
            apart,
        )
        self._calls.append(call)
        self._last = after, None if after.is_inference() else after._version, call

    def _replay(self, state: Tensor, output: Tensor, after: Tensor, score: Tensor) -> None:
        if len(self._replays) < _MAX_CALLS:
            start, following, seen = (self._fingerprints(t) for t in (state, after, output))
            self._replays.append(Call(start, following, seen, score.detach().clone(), _how(state, output), {}, None))

    def update(self) -> None:
        """An optimiser is about to step."""
        if self._replays and self._found is None:
            self.read()
        elif self._calls and self.open:
            self._stop("an optimiser stepped before any of these functions replayed something")

    def _stop(self, trouble: str = "") -> None:
        self.open, self.trouble = False, self.trouble or trouble
        self._last = None
        self._fingerprints.patterns.clear()

    def read(self) -> None:
        """Reads all that was kept, and says what is wrong; once."""
        if self._found is not None:
            return
        self._stop()
        if not self._replays or not self._calls:
            missing = "replay with a gradient" if self._calls else "rollout"
            why = self.trouble or f"no {missing} was seen in this process"
            self._found = {"pairs": 0, "findings": [], "text": f"the first update was not audited: {why}"}
            return
        try:
            drawn, replayed = _read(list(self._calls)), _read(self._replays)
            self._found = judge(drawn, replayed, self._between(), self.forgotten)
        except Exception as error:  # of a device, for one, which the script will hear of itself
            why = f"{type(error).__name__}: {error}"
            self._found = {"pairs": 0, "findings": [], "text": f"the first update was not audited: {why}"}
        for text in self._found["findings"]:
            self._say(f"first update: {text}")
        self._calls.clear()
        self._replays.clear()

    def _between(self) -> Counter[str]:
        """How many calls start from the previous call's output, from a rounding of it, or from something near it."""
        found: Counter[str] = Counter()
        calls = list(self._calls)
        for before, call in pairwise(calls):
            if call.apart is None:
                found["same"] += call.start is before.after
                continue
            apart, start = call.apart.tolist(), call.start.tolist()
            if start == before.after.tolist():
                found["same"] += 1
            elif max(apart) < _NEAR:
                kept = [d for d, prints in before.rounded.items() if prints.tolist() == start]
                found[_name(kept[0]) if kept else "near"] += 1
        return found

    def result(self) -> dict[str, Any]:
        """What was found, in plain numbers and texts."""
        self.read()
        assert self._found is not None
        return self._found


class _Hook:
    """Tells an audit of an optimiser's step, as long as it is there."""

    def __init__(self, audit: Audit) -> None:
        self._audit = weakref.ref(audit)

    def __call__(self, *_: Any) -> None:
        audit = self._audit()
        if audit is not None:
            audit.update()


def _how(state: Tensor, output: Tensor) -> dict[str, str]:
    """What may make a model's output another one, beside its inputs."""
    device = state.device.type
    auto = torch.is_autocast_enabled(device)
    return {
        "batch": str(len(state)),
        "shape of a sample": str(tuple(state.shape[1:])),
        "latents": _name(state.dtype),
        "model output": _name(output.dtype),
        "autocast": _name(torch.get_autocast_dtype(device)) if auto else "off",
    }


def _read(calls: Sequence[Call]) -> list[Pair]:
    """The samples of calls, with one wait for the device."""
    device = calls[0].start.device
    prints, scores = [], []
    for call in calls:
        prints += [call.start, call.after, call.output, *call.rounded.values()]
        scores.append(torch.full_like(call.start, math.nan, dtype=torch.float64) if call.score is None else call.score)
    whole = iter(torch.cat([p.to(device) for p in prints]).tolist())
    numbers = iter(torch.cat([s.to(device, torch.float64) for s in scores]).tolist())
    found = []
    for call in calls:
        names = [_name(dtype) for dtype in call.rounded]
        columns = [list(islice(whole, len(call.start))) for _ in range(3 + len(names))]
        for start, after, output, *rest in zip(*columns, strict=True):
            found.append(Pair(start, after, output, next(numbers), dict(zip(names, rest, strict=True)), call.how))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
