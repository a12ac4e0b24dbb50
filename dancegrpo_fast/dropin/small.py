"""Arguments for a step function like those of a real call, but small and on the CPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .apart import twin
from .roles import Layout

EPS = torch.finfo(torch.float32).eps
SEED = 20
_BATCH, _SIDE = 2, 4
Values = tuple[Any, ...]


@dataclass(frozen=True)
class Setting:
    """One comparison: at which step, whether a next sample is scored, whether a generator is given."""

    step: str
    at: int | None
    scored: bool
    generator: bool = False

    def __str__(self) -> str:
        way = "scoring" if self.scored else "sampling from a generator" if self.generator else "sampling"
        return f"{way} at the {self.step} step"


class Small:
    """Arguments like those of a real call, with few numbers, on the CPU."""

    def __init__(self, layout: Layout, values: Values) -> None:
        self.layout = layout
        state, output = values[layout.state], values[layout.output]
        after = None if layout.next is None else values[layout.next]
        self.tensors = {layout.state: state.dtype, layout.output: output.dtype}
        if layout.next is not None:
            self.tensors[layout.next] = after.dtype if isinstance(after, Tensor) else state.dtype
        self.batch = state.shape[0] if state.ndim else 1
        self.shape = (_BATCH, *(min(side, _SIDE) for side in state.shape[1:]))
        # Copies of a schedule that was made in inference mode are to be saved for a backward.
        with torch.inference_mode(False), torch.no_grad():
            self.values = [None if p in self.tensors else twin(v, _on_cpu) for p, v in enumerate(values)]
        self.owner = None if layout.owner is None else self.values[layout.owner]
        self.times = getattr(self.owner, "timesteps", None)
        self.given = layout.generator is not None and values[layout.generator] is not None

    @property
    def count(self) -> int | None:
        """How many steps the schedule has; None where it is not seen."""
        if self.layout.step is None:
            return None
        if self.layout.sigmas is not None:
            sigmas: Any = self.values[self.layout.sigmas]
            return len(sigmas) - 1
        return len(self.times) if isinstance(self.times, Tensor) and self.times.ndim == 1 else None

    def settings(self) -> Iterator[Setting]:
        """All that is compared, the inner step first."""
        places: dict[int | None, str] = {None: "given"}
        if self.count is not None:
            places = {self.count // 2: "inner"}
            # What a function does where sigma is near 1 shows at the second step.
            for at, name in ((0, "first"), (1, "second"), (self.count - 1, "last")):
                if 0 <= at < self.count:
                    places.setdefault(at, name)
        for place, name in places.items():
            yield Setting(name, place, False)
            if self.layout.next is not None:
                yield Setting(name, place, True)
            if self.layout.generator is not None:
                yield Setting(name, place, False, generator=True)

    def make(self, setting: Setting, nudge: int = 0, real: bool = False) -> list[Any]:
        """The arguments: with `nudge` 1 or -1 each number is off by a rounding; `real` takes the call's own dtypes."""
        layout = self.layout
        numbers, signs = (torch.Generator().manual_seed(SEED + i) for i in range(2))
        state, output, step = (torch.randn(self.shape, generator=numbers) for _ in range(3))
        drawn = {layout.state: state, layout.output: output, layout.next: state + 0.5 * step}
        made: list[Any] = []
        for place, value in enumerate(self.values):
            if place in self.tensors:
                tensor = _nudged(drawn[place], nudge, signs)
                made.append(tensor.to(self.tensors[place]) if real else tensor)
            elif place == layout.owner:
                made.append(self._scheduler(value, setting, nudge, signs))
            elif place == layout.generator:
                made.append(_generators(value) if setting.generator else None)
            elif place in (layout.step, layout.after) and setting.at is not None:
                made.append(self._step(value, setting.at + (place == layout.after)))
            else:
                made.append(self._other(value, nudge, signs, place == layout.sigmas))
        if layout.next is not None and not setting.scored:
            made[layout.next] = None
        return made

    def _scheduler(self, value: Any, setting: Setting, nudge: int, signs: torch.Generator) -> Any:
        double = twin(value)
        for name, held in vars(double).items() if nudge else ():
            if isinstance(held, Tensor) and name != "timesteps":
                double.__dict__[name] = _nudged(held, nudge, signs)
        if setting.at is not None and self.values[self.layout.step] is None:  # type: ignore[index]  # it is counted
            double._step_index = setting.at
        return double

    def _step(self, value: Any, at: int) -> Any:
        """Step `at` in the form of `value`: an index or a timestep, for each sample or for all."""
        if value is None:
            return None
        tensor = isinstance(value, Tensor)
        whole = not value.is_floating_point() if tensor else isinstance(value, int)
        number: Any = at
        if self.layout.sigmas is None and self.times is not None and not (whole and self.times.is_floating_point()):
            number = self.times[at] if at < len(self.times) else self.times.new_zeros(())
        if not tensor:
            return type(value)(number)
        shape = () if value.ndim == 0 else (_BATCH if len(value) == self.batch else 1,)
        return torch.as_tensor(number).to(value.dtype).expand(shape).clone()

    def _other(self, value: Any, nudge: int, signs: torch.Generator, schedule: bool) -> Any:
        if not isinstance(value, Tensor):
            return twin(value)
        if not schedule and value.ndim:
            value = value[torch.arange(_BATCH) % self.batch] if len(value) == self.batch else value
            value = value[tuple(map(slice, self.shape))] if value.ndim == len(self.shape) else value
        return _nudged(value, nudge, signs)


def _generators(value: Any) -> Any:
    count = len(value[:_BATCH]) if isinstance(value, list) else 1
    made = [torch.Generator().manual_seed(SEED + i) for i in range(count)]
    return made if isinstance(value, list) else made[0]


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _nudged(value: Tensor, nudge: int, signs: torch.Generator) -> Tensor:
    if not nudge or not value.is_floating_point():
        return value.clone()
    up = torch.randint(0, 2, value.shape, generator=signs) * 2 - 1
    # 0 and 1 are ends of a schedule, which functions compare with.
    return torch.where(value.abs() == 1, value, (value.double() * (1 + nudge * EPS * up)).to(value.dtype))
