"""What the shims share: samplers by schedule, and one step or score with its statistics."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..checks import check_choice, check_dtype, check_int
from ..ops._checks import FLOATS
from ..ops.transition import check_scoring, log_prob_op, transition_log_prob, transition_step
from ..transitions import PACKED_COLUMNS, TransitionTable

# Both far above what a script uses at once; past them everything is built anew, not kept for ever.
_MAX_SCHEDULES, _MAX_SAMPLERS = 64, 16
_samplers: Any = WeakIdKeyDictionary()
_by_numbers: dict[Any, Any] = {}

# As published: a float32 root and logarithm.
_LOG_ROOT = torch.log(torch.sqrt(2 * torch.tensor(math.pi, dtype=torch.float32, device="cpu")))

Built = TypeVar("Built")
Rows = Callable[[str], Tensor]
Mean = Callable[[Tensor, Tensor, Rows], Tensor]


class Published(NamedTuple):
    """A sampler in its project's order of operations.

    Attributes:
        columns: `[T]` each, by name, on the CPU.
        mean: of latents, model output and the step's columns, differentiable in the output.
        on_cpu: the project leaves the columns on the CPU.
        noise_first: the product is `noise * tau`, else `tau * noise`.
    """

    columns: dict[str, Tensor]
    mean: Mean
    on_cpu: bool = False
    noise_first: bool = False


class Sampler:
    """A table, what is read of it in every call as Python numbers, and the published way to compute its steps."""

    def __init__(self, table: TransitionTable, publish: Callable[[], Published] | None = None) -> None:
        self.table = table
        self._publish = publish
        self._on_device: dict[Any, Tensor] = {}
        self.a, self.b, self.sigma = table.a.tolist(), table.b.tolist(), (-table.q).tolist()

    @cached_property
    def published(self) -> Published:
        """As the project writes it."""
        assert self._publish is not None
        with _plain():
            return self._publish()

    @cached_property
    def scored(self) -> TransitionTable:
        """Scores a mean that was computed before, in the place of the model output."""
        with _plain():
            one, zero = torch.ones_like(self.table.a), torch.zeros_like(self.table.a)
            return replace(self.table, a=zero, b=one, tau=self.published.columns["tau"].double())

    @cached_property
    def _numbers(self) -> dict[str, list[float]]:
        root = self.table.step_size.sqrt()
        named = {"tau": self.table.tau, "std": self.table.tau / root, "root": root, "dt": -self.table.step_size}
        return {name: column.tolist() for name, column in named.items()}

    @cached_property
    def _published_numbers(self) -> dict[str, list[float]]:
        return {name: column.tolist() for name, column in self.published.columns.items()}

    def statistic(self, name: str, step: int | Tensor, shape: tuple[int, ...], device: Any, rounding: str) -> Tensor:
        """ "tau", "std" (without `sqrt(-dt)`), "root" (`sqrt(-dt)`) or "dt" at the step: float32 of `shape`."""
        numbers = (self._published_numbers if rounding == "reference" else self._numbers)[name]
        if not isinstance(step, Tensor):
            return torch.full(shape, numbers[step], dtype=torch.float32, device=device)
        key = (name, rounding, device)
        if key not in self._on_device:
            with _plain():
                self._on_device[key] = torch.tensor(numbers, dtype=torch.float32, device=device)
        found = pick(self._on_device[key], step)
        return found.expand(shape[0]).reshape(shape) if shape else found.reshape(())

    def rows(self, step: int | Tensor, latents: Tensor) -> Rows:
        """The published columns at a step, as the project has them: without dimensions, or `[K, 1, ...]`."""
        columns = self.published.columns
        home = latents.device if isinstance(step, Tensor) or not self.published.on_cpu else None
        if home is None or home.type == "cpu":
            if not isinstance(step, Tensor):
                return lambda name: columns[name][step]
            return lambda name: column(columns[name], step, latents)

        def moved(name: str) -> Tensor:
            if (name, home) not in self._on_device:
                with _plain():
                    self._on_device[name, home] = columns[name].to(home)
            return column(self._on_device[name, home], step, latents)

        return moved


class How(NamedTuple):
    """The options of our own that every step takes."""

    rounding: str
    backend: str
    latents_dtype: torch.dtype | None


class Outcome(NamedTuple):
    """One step: next latents, float32 log-probability `[B]`, and mean and estimate of x0 where they were asked for."""

    next_latents: Tensor
    log_prob: Tensor
    mean: Tensor | None
    denoised: Tensor | None


def cached(name: str, schedule: Tensor, key: Any, build: Callable[[Tensor], Built]) -> Built:
    """`build(schedule)`, once for every tensor, its in-place version and `key`, and for others of the same numbers.

    Raises:
        ValueError: `schedule` is not a tensor.
    """
    if not isinstance(schedule, Tensor):
        raise ValueError(f"{name}: got {type(schedule).__name__}, want a torch.Tensor")
    if schedule.is_inference():  # has no version
        return _shared(schedule, key, build)
    version, samplers = _samplers.get(schedule, (None, {}))
    if version != schedule._version:
        if len(_samplers) >= _MAX_SCHEDULES:
            _samplers.clear()
        samplers = {}
        _samplers[schedule] = (schedule._version, samplers)
    if key not in samplers:
        if len(samplers) >= _MAX_SAMPLERS:
            samplers.clear()
        samplers[key] = _shared(schedule, key, build)
    found: Built = samplers[key]
    return found


def _shared(schedule: Tensor, key: Any, build: Callable[[Tensor], Built]) -> Built:
    # A table takes as long to build as several steps, and scripts make their schedule anew for every rollout.
    numbers = (tuple(schedule.reshape(-1).tolist()), schedule.shape, schedule.dtype, schedule.device, key)
    if numbers not in _by_numbers:
        if len(_by_numbers) >= _MAX_SCHEDULES:
            _by_numbers.clear()
        with _plain():
            # A copy: others get it by these numbers, which the script may overwrite.
            _by_numbers[numbers] = build(schedule.detach().clone())
    found: Built = _by_numbers[numbers]
    return found


@contextmanager
def _plain() -> Iterator[None]:
    """What is built within is on the CPU and may be trained with, whatever the script's loop is in."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def unnormalized(table: TransitionTable) -> TransitionTable:
    """The same rows, scored without the Gaussian's constants."""
    return replace(table, kind=["unnormalized" if kind == "gaussian" else kind for kind in table.kind])


def as_step(name: str, index: int | Tensor, rows: int, latents: Tensor) -> int | Tensor:
    """The argument `name` as the ops take it: a number where that costs no host sync, else a tensor beside the latents.

    Raises:
        ValueError: a number that is no row of the table.
    """
    if isinstance(index, Tensor):
        if index.device.type != "cpu" or index.is_floating_point():
            index = index.to(latents.device, torch.int64)
            return index.reshape(()) if index.numel() == 1 else index
        values = index.reshape(-1).tolist()
        if not values:
            raise ValueError(f"{name}: got an empty tensor, want an int or an int64 tensor")
        for value in set(values):
            check_int(name, value, 0, rows - 1)
        if len(set(values)) > 1:
            return index.to(latents.device, torch.int64)
        index = values[0]
    return check_int(name, index, 0, rows - 1, " or an int64 tensor")


def pick(values: Tensor, step: Tensor) -> Tensor:
    """Rows `[K, ...]` of `values` at a step or at `[K]` of them."""
    return values.index_select(0, step.reshape(-1))  # `values[step]` reads a step without dimensions on the host


def column(values: Tensor, step: int | Tensor, latents: Tensor) -> Tensor:
    """`values[step]` broadcastable over `latents`: 0-dim for one step, `[K, 1, ...]` for `[K]` of them."""
    if not isinstance(step, Tensor):
        return values[step]
    picked = pick(values, step)
    return picked.reshape(()) if step.ndim == 0 else picked.reshape(-1, *(1,) * (latents.ndim - 1))


def result_dtype(latents: Tensor, model_output: Tensor) -> torch.dtype:
    """The dtype in which a peer holds `latents + sigma * model_output`."""
    return torch.promote_types(latents.dtype, model_output.dtype)


def noise_like_sum(latents: Tensor, model_output: Tensor) -> Tensor:
    """`torch.randn_like(latents + model_output)`: the order of its elements follows the strides of the sum."""
    if latents.is_contiguous() and model_output.is_contiguous():
        return torch.randn_like(latents, dtype=result_dtype(latents, model_output))
    with torch.no_grad():
        return torch.randn_like(latents + model_output)


def noise_like(model_output: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    """diffusers' `randn_tensor` of the model output's shape and device."""
    from diffusers.utils.torch_utils import randn_tensor

    drawn: Tensor = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
    return drawn


def stored(latents: Tensor, latents_dtype: torch.dtype | None) -> Tensor:
    """Rounded to what the script keeps latents in, in their own dtype."""
    return latents if latents_dtype is None else latents.to(latents_dtype).to(latents.dtype)


def _coefficients(sampler: Sampler, step: Tensor, latents: Tensor, names: str) -> list[Tensor]:
    rows = pick(sampler.table.packed(latents.device, latents.dtype), step)
    shape = (-1, *(1,) * (latents.ndim - 1))
    return [rows[:, PACKED_COLUMNS.index(name)].reshape(shape) for name in names]


def widened(latents: Tensor, output: Tensor) -> Tensor:
    """The latents as steps are computed: without their graph, in float32 at least."""
    x = latents.detach()
    wide = torch.float64 if torch.float64 in (x.dtype, output.dtype) else torch.float32
    return x if x.dtype == wide else x.to(wide)


def exact_mean(x: Tensor, output: Tensor, sampler: Sampler, step: int | Tensor, dtype: torch.dtype) -> Tensor:
    """`a x + b v` in `dtype`, computed in that of `x`; differentiable in the output."""
    if isinstance(step, Tensor):
        a, b = _coefficients(sampler, step, x, "ab")
        found = torch.addcmul(x * a, output.to(x.dtype), b)
    else:
        found = torch.add(x * sampler.a[step], output, alpha=sampler.b[step])
    return found if found.dtype == dtype else found.to(dtype)


def exact_denoised(x: Tensor, output: Tensor, sampler: Sampler, step: int | Tensor, dtype: torch.dtype) -> Tensor:
    """`x - sigma v` in `dtype`, computed in that of `x`; differentiable in the output."""
    if isinstance(step, Tensor):
        found = torch.addcmul(x, output.to(x.dtype), _coefficients(sampler, step, x, "q")[0])
    else:
        found = torch.sub(x, output, alpha=sampler.sigma[step])
    return found if found.dtype == dtype else found.to(dtype)


def _score(
    latents: Tensor, output: Tensor, after: Tensor, table: TransitionTable, step: int | Tensor, backend: str
) -> Tensor:
    if torch.is_grad_enabled() and output.requires_grad:
        return transition_log_prob(latents, output, after, table, step, backend=backend)
    arguments = check_scoring(latents, output, after, table, step, None, None, "exact", backend)
    return log_prob_op(*arguments)


def advance(
    latents: Tensor,
    model_output: Tensor,
    sampler: Sampler,
    step: int | Tensor,
    next_latents: Tensor | None,
    draw: Callable[[], Tensor | None],
    how: How,
    *,
    out_dtype: torch.dtype,
    mean: bool = False,
    denoised: bool = False,
    elementwise: bool = False,
) -> Outcome:
    """Samples the next latents from `draw()`, or scores `next_latents`.

    What is sampled never carries a gradient; the log-probability, the mean and the estimate of x0 do, in the model
    output. With `how.latents_dtype` it is rounded to that dtype before it is scored, and returned in `out_dtype`.
    `elementwise`: with `how.rounding` "reference", score as the float64 mean of float32 elements.
    """
    if isinstance(step, Tensor) and step.ndim == 1 and len(step) != len(latents):
        step = step.expand(len(latents))
    check_choice("rounding", how.rounding, ("exact", "reference"))
    if how.latents_dtype is not None:
        check_dtype("latents_dtype", how.latents_dtype, FLOATS)
    if how.rounding == "reference" and sampler._publish is not None:
        return _advance_published(latents, model_output, sampler, step, next_latents, draw, how, denoised, elementwise)
    clean, kept = None, next_latents
    log_prob = None
    trained = torch.is_grad_enabled() and model_output.requires_grad
    if kept is None:
        storage = coarser(out_dtype, how.latents_dtype)
        with torch.no_grad():
            kept, log_prob, clean = transition_step(
                latents,
                model_output,
                sampler.table,
                step,
                noise=draw(),
                out_dtype=storage,
                return_denoised=denoised and not trained and storage == out_dtype,
                backend=how.backend,
            )
    if log_prob is None or trained:
        log_prob = _score(latents, model_output, kept, sampler.table, step, how.backend)
    found_mean = None
    if mean or (denoised and clean is None):
        x = widened(latents, model_output)
        if mean:
            found_mean = exact_mean(x, model_output, sampler, step, out_dtype)
        if denoised and clean is None:
            clean = exact_denoised(x, model_output, sampler, step, out_dtype)
    return Outcome(kept if next_latents is not None else kept.to(out_dtype), log_prob, found_mean, clean)


def coarser(out_dtype: torch.dtype, latents_dtype: torch.dtype | None) -> torch.dtype:
    """What a number is rounded to that is kept in the one and handed on in the other."""
    if latents_dtype is None or torch.finfo(latents_dtype).eps <= torch.finfo(out_dtype).eps:
        return out_dtype
    return latents_dtype


def _advance_published(
    latents: Tensor,
    model_output: Tensor,
    sampler: Sampler,
    step: int | Tensor,
    next_latents: Tensor | None,
    draw: Callable[[], Tensor | None],
    how: How,
    denoised: bool,
    elementwise: bool,
) -> Outcome:
    """`advance` in the project's own order of operations, whose roundings only torch itself repeats."""
    row, x = sampler.rows(step, latents), latents.detach()
    mean = sampler.published.mean(x, model_output, row)
    plain = mean.detach()
    if next_latents is None:
        noise = draw()
        next_latents = plain
        if noise is not None:
            next_latents = plain + (noise * row("tau") if sampler.published.noise_first else row("tau") * noise)
        next_latents = stored(next_latents, how.latents_dtype)
    if elementwise:
        log_prob = _elementwise_log_prob(next_latents.detach() - mean, row("tau"), sampler.table.kind[0])
    else:
        log_prob = _score(plain, mean, next_latents, sampler.scored, step, how.backend)
    clean = x - times(row("sigma"), model_output, sampler.published.on_cpu) if denoised else None
    return Outcome(next_latents, log_prob, mean, clean)


def times(number: Tensor, values: Tensor, on_cpu: bool) -> Tensor:
    """`number * values` as torch has it where the number is on the CPU, or on the values' device."""
    if on_cpu and number.device.type != "cpu" and values.dtype in (torch.bfloat16, torch.float16):
        # A number on the CPU multiplies in float32, one on the device is rounded to the values' dtype before.
        return (number * values.float()).to(values.dtype)
    return number * values


def _elementwise_log_prob(difference: Tensor, tau: Tensor, kind: str) -> Tensor:
    elements = -(difference**2)
    safe = torch.where(tau > 0, tau, 1.0)
    if kind == "gaussian":
        elements = elements / (2 * safe**2) - torch.log(safe) - _LOG_ROOT
    elements = torch.where(tau > 0, elements, 0.0)
    return elements.double().mean(dim=tuple(range(1, elements.ndim))).to(elements.dtype)
