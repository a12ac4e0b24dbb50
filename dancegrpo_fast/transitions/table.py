"""A sampler as one row of numbers per step, checked and packed for the kernels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """One row per denoising step.

    Attributes:
        a, b, tau, p, q: float64 CPU tensors `[T]`, the coefficients above.
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

    Raises:
        ValueError: a column of another length or dtype, numbers that are not finite, a negative `tau`, or one so small
            that float32 does not hold `1 / tau^2`.
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
    _packed: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        rows = len(self.kind)
        if rows == 0:
            raise ValueError("table: got no rows, want at least one step")
        for name in ("a", "b", "tau", "p", "q", "times", "step_size", "drift", "drift_weight", "denoised_weight"):
            column = getattr(self, name)
            if column.shape != (rows,) or column.dtype != torch.float64:
                raise ValueError(
                    f"{name}: got {tuple(column.shape)} of {column.dtype}, want ({rows},) of torch.float64"
                )
        for name in ("a", "b", "tau", "p", "q"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{name}: got {getattr(self, name).tolist()}, want finite numbers")
        if bool((self.tau < 0).any()):
            raise ValueError(f"tau: got {self.tau.tolist()}, want no negative noise")
        object.__setattr__(self, "kind", tuple(self.kind))
        for kind in self.kind:
            if kind not in get_args(LogProbKind):
                raise ValueError(f'kind: got "{kind}", want one of {list(get_args(LogProbKind))}')
        for dtype in (torch.float32, torch.float64):
            self._packed[_CPU, dtype] = self._pack().to(dtype)
        scale = self._packed[_CPU, torch.float32][:, PACKED_COLUMNS.index("log_prob_scale")]
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"tau: got {self.tau.tolist()}, want 0 or noise of which float32 holds 1 / tau^2")
        # Read once here: the ops ask in every call, where a tensor's truth would break a compiled graph.
        object.__setattr__(self, "is_deterministic", not bool((self.tau > 0).any()))
        object.__setattr__(self, "has_reference_rounding", not bool(torch.isnan(self.drift).any()))
        object.__setattr__(self, "has_step_size", bool((self.step_size > 0).all()))

    def __len__(self) -> int:
        return len(self.kind)

    def packed(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as one `[T, 11]` tensor on `device`, in the order of `PACKED_COLUMNS`; made once per device."""
        key = (torch.device(device), dtype)
        if key not in self._packed:
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
    if len(stochastic) != len(deterministic) or not torch.equal(stochastic.times, deterministic.times):
        raise ValueError(
            f"deterministic: got {len(deterministic)} steps at {deterministic.times.tolist()}, "
            f"want those of stochastic, {stochastic.times.tolist()}"
        )
    chosen = torch.zeros(len(stochastic), dtype=torch.bool)
    for index in window:
        if not 0 <= index < len(stochastic):
            raise ValueError(f"window: got step {index}, want 0 to {len(stochastic) - 1}")
        chosen[index] = True

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
