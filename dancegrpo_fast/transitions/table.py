"""A sampler as one row of numbers per step, checked and packed for the kernels."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import as_column, check_choice, check_int, shown

LogProbKind = Literal["gaussian", "unnormalized", "quadratic", "none"]

_CPU = torch.device("cpu")
# Order of the packed columns; kernels/transition/math.h reads them in this order.
PACKED_COLUMNS = (
    "a",
    "b",
    "tau",
    "p",
    "q",
    "log_prob_scale",
    "log_prob_constant",
    "drift",
    "drift_weight",
    "denoised_weight",
    "step_size",
)


@dataclass(frozen=True, eq=False, repr=False)
class TransitionTable:
    """One row per denoising step; `from_coefficients` builds one for a sampler of your own.

    Attributes:
        a, b, tau, p, q: float64 CPU tensors `[T]`, the coefficients of `mean = a x + b v`, `x' = mean + tau eps` and
            `x0 = p x + q v`; p and q are NaN in rows whose x0 is not known.
        kind: log-probability of each row: "gaussian" (`-mean(d^2) / (2 tau^2) - log tau - log(2 pi) / 2`),
            "unnormalized" (its first term, which is all that a ratio needs), "quadratic" (`-mean(d^2)`) or "none" (0).
            A row with `tau = 0` scores 0 whatever its kind.
        times: float64 `[T]`, what the model is told at each step: sigma for flows, the training timestep for diffusion.
        step_size: float64 `[T]`, `sigma_i - sigma_{i+1} > 0` for flows, 0 where the sampler has none.
        drift, drift_weight, denoised_weight: float64 `[T]`, how the published implementations split `b v` into two
            products, `drift_weight (drift v) + denoised_weight (q v)`; NaN where no such split is known.
        is_deterministic: no row adds noise.
        has_reference_rounding: `rounding="reference"` is defined for every row.
        has_step_size: every row has a flow step size, which `ratio_norm` needs.
        unscored: the rows that score nothing: no noise, or kind "none". `policy_loss` takes them with weight 0 only.
        has_denoised: p and q are known in every row, which `return_denoised` needs.
        numbers: `times` as Python's, for choices that the host takes.

    Raises:
        ValueError: a column of another type, length, dtype or device, numbers that are not finite, a negative `tau`,
            or one so small that float32 does not hold `1 / tau^2`.
    """

    a: Tensor
    b: Tensor
    tau: Tensor
    p: Tensor
    q: Tensor
    kind: Sequence[LogProbKind]
    times: Tensor
    step_size: Tensor
    drift: Tensor
    drift_weight: Tensor
    denoised_weight: Tensor
    is_deterministic: bool = field(init=False)
    has_reference_rounding: bool = field(init=False)
    has_step_size: bool = field(init=False)
    unscored: tuple[int, ...] = field(init=False)
    has_denoised: bool = field(init=False)
    numbers: tuple[float, ...] = field(init=False)
    _packed: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_coefficients(
        cls,
        a: Tensor | Sequence[float],
        b: Tensor | Sequence[float] | float,
        tau: Tensor | Sequence[float] | float,
        *,
        p: Tensor | Sequence[float] | float | None = None,
        q: Tensor | Sequence[float] | float | None = None,
        times: Tensor | Sequence[float] | float | None = None,
        step_size: Tensor | Sequence[float] | float = 0.0,
        kind: LogProbKind | Sequence[LogProbKind] = "gaussian",
    ) -> "TransitionTable":
        """The table of any sampler with `x' = a x + b v + tau eps`; a number stands for every row.

        Args:
            a, b, tau: `[T]`, any real dtype and device.
            p, q: `[T]`, `x0 = p x + q v`; without them `return_denoised` is refused.
            times: `[T]`, what the model is told at each step; default 0 to T - 1.
            step_size: `[T]`, of a flow, for `ratio_norm`; 0 where the sampler has none.
            kind: of the log-probability, one for all rows or one for each.

        Raises:
            ValueError: columns of other lengths, numbers that are not finite, negative `tau`, or only one of p and q.
        """
        first = as_column("a", a)
        rows = len(first)

        def column(name: str, value: Any) -> Tensor:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return as_column(name, [value] * rows if number else value)

        if (p is None) != (q is None):
            raise ValueError(f"{'p' if p is None else 'q'}: got None, want both p and q or neither")
        unknown = torch.full_like(first, math.nan)
        return cls(
            a=first,
            b=column("b", b),
            tau=column("tau", tau),
            p=unknown if p is None else column("p", p),
            q=unknown if q is None else column("q", q),
            kind=(kind,) * rows if isinstance(kind, str) else kind,
            times=column("times", range(rows) if times is None else times),
            step_size=column("step_size", step_size),
            drift=unknown,
            drift_weight=unknown,
            denoised_weight=unknown,
        )

    def __post_init__(self) -> None:
        if isinstance(self.kind, str) or not isinstance(self.kind, Sequence):
            raise ValueError(f"kind: got {shown(self.kind)}, want one word for each row")
        rows = len(self.kind)
        if rows == 0:
            raise ValueError("table: got no rows, want at least one step")
        for kind in self.kind:
            check_choice("kind", kind, get_args(LogProbKind))
        object.__setattr__(self, "kind", tuple(self.kind))
        for name in ("a", "b", "tau", "p", "q", "times", "step_size", "drift", "drift_weight", "denoised_weight"):
            column = getattr(self, name)
            if not isinstance(column, Tensor) or column.dtype != torch.float64 or column.shape != (rows,):
                wanted = f"a tensor of torch.float64 and shape ({rows},), as kind has"
                raise ValueError(f"{name}: got {shown(column)}, want {wanted}")
            if column.device != _CPU:
                raise ValueError(f"{name}: got a tensor on {column.device}, want it on the CPU")
            object.__setattr__(self, name, column.detach())
        unknown = self.p.isnan() & self.q.isnan()
        for name in ("a", "b", "tau", "p", "q", "times", "step_size"):
            column = getattr(self, name)
            if not bool((column.isfinite() | (unknown if name in "pq" else False)).all()):
                raise ValueError(f"{name}: got {column.tolist()}, want finite numbers")
        if bool((self.tau < 0).any()):
            raise ValueError(f"tau: got {self.tau.tolist()}, want no negative noise")
        for dtype in (torch.float32, torch.float64):
            self._packed[_CPU, dtype] = self._pack().to(dtype)
        scale = self._packed[_CPU, torch.float32][:, PACKED_COLUMNS.index("log_prob_scale")]
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"tau: got {self.tau.tolist()}, want 0 or noise of which float32 holds 1 / tau^2")
        # Read once here: the ops ask in every call, where a tensor's truth would break a compiled graph.
        object.__setattr__(self, "is_deterministic", not bool((self.tau > 0).any()))
        object.__setattr__(self, "has_reference_rounding", not bool(torch.isnan(self.drift).any()))
        object.__setattr__(self, "has_step_size", bool((self.step_size > 0).all()))
        object.__setattr__(self, "unscored", tuple((scale == 0).nonzero().flatten().tolist()))
        object.__setattr__(self, "has_denoised", not bool(unknown.any()))
        object.__setattr__(self, "numbers", tuple(self.times.tolist()))

    def __len__(self) -> int:
        return len(self.kind)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(self.kind))
        noise = "no noise" if self.is_deterministic else f"noise {self.tau.min():.4g} to {self.tau.max():.4g}"
        return f"TransitionTable({len(self)} rows, {kinds}, {noise})"

    def packed(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as one `[T, 11]` tensor on `device`, in the order of `PACKED_COLUMNS`; made once per device."""
        key = (torch.device(device), dtype)
        if key not in self._packed:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # what is made in it cannot be trained with later
                    return self.packed(device, dtype)
            self._packed[key] = self._packed[_CPU, dtype].to(device)
        return self._packed[key]

    def _pack(self) -> Tensor:
        noisy = self.tau > 0
        gaussian = torch.tensor([k == "gaussian" for k in self.kind]) & noisy
        weighted = torch.tensor([k in ("gaussian", "unnormalized") for k in self.kind]) & noisy
        quadratic = torch.tensor([k == "quadratic" for k in self.kind]) & noisy
        tau = torch.where(noisy, self.tau, 1.0)
        zero = torch.zeros_like(tau)
        scale = torch.where(weighted, -0.5 / tau.square(), torch.where(quadratic, -1.0, zero))
        constant = torch.where(gaussian, -torch.log(tau) - 0.5 * math.log(2 * math.pi), zero)
        named = {"log_prob_scale": scale, "log_prob_constant": constant}
        return torch.stack([named.get(name, getattr(self, name, zero)) for name in PACKED_COLUMNS], dim=1)


def mixed(stochastic: TransitionTable, deterministic: TransitionTable, window: Sequence[int]) -> TransitionTable:
    """Rows of `stochastic` at the step indices in `window`, of `deterministic` elsewhere (MixGRPO, arXiv 2507.21802).

    Raises ValueError for tables of different lengths or times, or an index outside them.
    """
    for name, table in (("stochastic", stochastic), ("deterministic", deterministic)):
        if not isinstance(table, TransitionTable):
            raise ValueError(f"{name}: got {shown(table)}, want a TransitionTable")
    if len(stochastic) != len(deterministic) or not torch.equal(stochastic.times, deterministic.times):
        raise ValueError(
            f"deterministic: got {len(deterministic)} steps at {deterministic.times.tolist()}, "
            f"want those of stochastic, {stochastic.times.tolist()}"
        )
    if isinstance(window, str) or not isinstance(window, Collection):
        raise ValueError(f"window: got {shown(window)}, want step indices")
    chosen = torch.zeros(len(stochastic), dtype=torch.bool)
    for index in window:
        chosen[check_int("window", index, 0, len(stochastic) - 1)] = True

    def pick(name: str) -> Tensor:
        return torch.where(chosen, getattr(stochastic, name), getattr(deterministic, name))

    kinds = zip(chosen.tolist(), stochastic.kind, deterministic.kind, strict=True)
    return TransitionTable(
        a=pick("a"),
        b=pick("b"),
        tau=pick("tau"),
        p=pick("p"),
        q=pick("q"),
        kind=[noisy if inside else plain for inside, noisy, plain in kinds],
        times=pick("times"),
        step_size=pick("step_size"),
        drift=pick("drift"),
        drift_weight=pick("drift_weight"),
        denoised_weight=pick("denoised_weight"),
    )
