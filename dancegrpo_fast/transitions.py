"""Samplers as tables: every sampler of this field is affine in the latents and the model output.

    mean = a x + b v          x' = mean + tau eps          x0 = p x + q v

A table holds one row per step, computed once in float64 on the host; the kernels know no sampler.
Flow samplers follow `z_t = (1 - t) x0 + t eps`, `v = eps - x0`; diffusion samplers follow
`z_t = sqrt(A) x0 + sqrt(1 - A) eps`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

LogProbKind = Literal["gaussian", "unnormalized", "quadratic", "none"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

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
        unscored: the rows that score nothing: no noise, or kind "none". `policy_loss` takes them with weight 0 only.

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
    unscored: tuple[int, ...] = field(init=False)
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
        object.__setattr__(self, "unscored", tuple((scale == 0).nonzero().flatten().tolist()))

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


def _as_float64(name: str, values: Tensor | Sequence[float]) -> Tensor:
    column = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    if column.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(column.shape)}, want one dimension")
    if not bool(torch.isfinite(column).all()):
        raise ValueError(f"{name}: got {column.tolist()}, want finite numbers")
    return column


def _check_sigmas(sigmas: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    column = _as_float64("sigmas", sigmas)
    if len(column) < 2:
        raise ValueError(f"sigmas: got {len(column)} values, want at least 2 (one more than steps)")
    if bool((column < 0).any()) or bool((column > 1).any()):
        raise ValueError(f"sigmas: got {column.tolist()}, want values from 1 down to 0")
    if not bool((column[1:] < column[:-1]).all()):
        raise ValueError(f"sigmas: got {column.tolist()}, want strictly decreasing values")
    return column[:-1], column[1:]


def _check_level(name: str, value: float, high: float = math.inf) -> float:
    number = float(value)
    if not (0.0 <= number <= high) or math.isinf(number):
        bound = "a finite number of at least 0" if math.isinf(high) else f"a number from 0 to {high:g}"
        raise ValueError(f"{name}: got {value}, want {bound}")
    return number


def shifted_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """Flow schedule `shift u / (1 + (shift - 1) u)` with `u` from 1 to 0: float64 `[num_steps + 1]`.

    Raises:
        ValueError: `num_steps` below 1 or `shift` not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, want at least 1")
    if not (0.0 < shift < math.inf):
        raise ValueError(f"shift: got {shift}, want a positive number")
    u = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * u / (1.0 + (shift - 1.0) * u)


def _flow_sde_rows(s: Tensor, n: Tensor, level: Tensor) -> TransitionTable:
    dt = n - s
    pull = level.square() * dt / (2.0 * s.square())
    tau = level * torch.sqrt(-dt)
    return TransitionTable(
        a=1.0 + pull * s,
        b=dt + pull * s * (1.0 - s),
        tau=tau,
        p=torch.ones_like(s),
        q=-s,
        kind=["gaussian"] * len(s),
        times=s,
        step_size=-dt,
        drift=dt,
        drift_weight=torch.ones_like(s),
        denoised_weight=-pull * (1.0 - s),
    )


def dance_sde(sigmas: Tensor | Sequence[float], eta: float) -> TransitionTable:
    """DanceGRPO's rectified-flow SDE (arXiv 2505.07818).

    Args:
        sigmas: `[T + 1]`, strictly decreasing within [0, 1].
        eta: noise level, at least 0; 0 gives the Euler ODE step.

    Raises:
        ValueError: bad `sigmas` or `eta`.
    """
    s, n = _check_sigmas(sigmas)
    return _flow_sde_rows(s, n, torch.full_like(s, _check_level("eta", eta)))


def flow_sde(sigmas: Tensor | Sequence[float], noise_level: float) -> TransitionTable:
    """Flow-GRPO's SDE (arXiv 2505.05470): Dance-SDE with `eta = noise_level sqrt(s / (1 - s))`, one step on at 1.

    Raises:
        ValueError: bad `sigmas` or `noise_level`.
    """
    s, n = _check_sigmas(sigmas)
    level = _check_level("noise_level", noise_level)
    guarded = torch.where(s == 1.0, n[0], s)
    return _flow_sde_rows(s, n, level * torch.sqrt(s / (1.0 - guarded)))


def cps(sigmas: Tensor | Sequence[float], noise_level: float) -> TransitionTable:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): the noise left is exactly the next sigma's.

    Args:
        sigmas: `[T + 1]`, strictly decreasing within [0, 1].
        noise_level: from 0 (deterministic) to 1 (all noise drawn anew).

    Raises:
        ValueError: bad `sigmas` or `noise_level`.
    """
    s, n = _check_sigmas(sigmas)
    angle = _check_level("noise_level", noise_level, 1.0) * math.pi / 2.0
    kept = n * math.cos(angle)
    return TransitionTable(
        a=(1.0 - n) + kept,
        b=-s * (1.0 - n) + kept * (1.0 - s),
        tau=n * math.sin(angle),
        p=torch.ones_like(s),
        q=-s,
        kind=["quadratic"] * len(s),
        times=s,
        step_size=s - n,
        drift=1.0 - s,
        drift_weight=kept,
        denoised_weight=1.0 - n,
    )


def ode(sigmas: Tensor | Sequence[float]) -> TransitionTable:
    """Euler step of the rectified-flow ODE; log-probability 0.

    Raises:
        ValueError: bad `sigmas`.
    """
    s, n = _check_sigmas(sigmas)
    zero = torch.zeros_like(s)
    return TransitionTable(
        a=torch.ones_like(s),
        b=n - s,
        tau=zero,
        p=torch.ones_like(s),
        q=-s,
        kind=["none"] * len(s),
        times=s,
        step_size=s - n,
        drift=n - s,
        drift_weight=torch.ones_like(s),
        denoised_weight=zero,
    )


@dataclass(frozen=True)
class _DiffusionSchedule:
    """Cumulative alphas here and at the next step, and `x0 = p x + q v`, `eps = r x + w v`."""

    alpha: Tensor
    next_alpha: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    w: Tensor
    times: Tensor


def _diffusion_schedule(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    prediction_type: str,
    previous_timesteps: Tensor | Sequence[int] | None,
    final_alpha_cumprod: float,
) -> _DiffusionSchedule:
    alphas = _as_float64("alphas_cumprod", alphas_cumprod)
    if bool((alphas <= 0).any()) or bool((alphas >= 1).any()):
        raise ValueError("alphas_cumprod: want values strictly between 0 and 1")
    times = _as_float64("timesteps", timesteps)
    if not torch.equal(times, times.round()):
        raise ValueError(f"timesteps: got {times.tolist()}, want whole numbers")
    times = times.to(torch.int64)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"timesteps: got shape {tuple(times.shape)}, want one dimension of at least one step")
    if bool((times < 0).any()) or bool((times >= len(alphas)).any()):
        raise ValueError(f"timesteps: got {times.tolist()}, want 0 to {len(alphas) - 1}")
    if previous_timesteps is None:
        previous = torch.cat([times[1:], torch.tensor([-1])])
    else:
        previous = torch.as_tensor(previous_timesteps, device="cpu").to(torch.int64)
    if previous.shape != times.shape:
        raise ValueError(f"previous_timesteps: got {tuple(previous.shape)}, want {tuple(times.shape)}")
    if not bool((previous < times).all()):
        if previous_timesteps is None:
            raise ValueError(f"timesteps: got {times.tolist()}, want strictly decreasing values")
        raise ValueError(f"previous_timesteps: got {previous.tolist()}, want each below {times.tolist()}")
    if not (0.0 < final_alpha_cumprod <= 1.0):
        raise ValueError(f"final_alpha_cumprod: got {final_alpha_cumprod}, want a number in (0, 1]")
    here = alphas[times]
    after = torch.where(previous >= 0, alphas[previous.clamp(min=0)], float(final_alpha_cumprod))
    if not bool((after >= here).all()):
        raise ValueError("alphas_cumprod: want a decreasing sequence, so that no step loses signal")
    signal, noise = here.sqrt(), (1.0 - here).sqrt()
    zero, one = torch.zeros_like(here), torch.ones_like(here)
    if prediction_type == "epsilon":
        p, q, r, w = 1.0 / signal, -noise / signal, zero, one
    elif prediction_type == "v_prediction":
        p, q, r, w = signal, -noise, noise, signal
    elif prediction_type == "sample":
        p, q, r, w = zero, one, 1.0 / noise, -signal / noise
    else:
        raise ValueError(f'prediction_type: got "{prediction_type}", want "epsilon", "v_prediction" or "sample"')
    return _DiffusionSchedule(here, after, p, q, r, w, times.to(torch.float64))


def _diffusion_table(d: _DiffusionSchedule, a: Tensor, b: Tensor, tau: Tensor) -> TransitionTable:
    unknown = torch.full_like(a, math.nan)
    return TransitionTable(
        a=a,
        b=b,
        tau=tau,
        p=d.p,
        q=d.q,
        kind=["gaussian"] * len(a),
        times=d.times,
        step_size=torch.zeros_like(a),
        drift=unknown,
        drift_weight=unknown,
        denoised_weight=unknown,
    )


def ddim(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    eta: float,
    prediction_type: PredictionType = "epsilon",
    *,
    previous_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_cumprod: float = 1.0,
) -> TransitionTable:
    """DDIM / DDPO step (arXiv 2010.02502, eq. 12 and 16).

    Args:
        alphas_cumprod: `[num_train_timesteps]`, decreasing, strictly between 0 and 1.
        timesteps: `[T]` training timesteps, strictly decreasing.
        eta: 0 is deterministic, 1 is DDPM's variance; at most what keeps `1 - A' - tau^2` from going negative.
        prediction_type: what the model predicts.
        previous_timesteps: `[T]`, where each step lands; negative: `final_alpha_cumprod`. Default: the next timestep.
        final_alpha_cumprod: cumulative alpha after the last step.

    Raises:
        ValueError: an argument out of its range.
    """
    d = _diffusion_schedule(alphas_cumprod, timesteps, prediction_type, previous_timesteps, final_alpha_cumprod)
    level = _check_level("eta", eta)
    tau = level * torch.sqrt((1.0 - d.next_alpha) / (1.0 - d.alpha) * (1.0 - d.alpha / d.next_alpha))
    left = 1.0 - d.next_alpha - tau.square()
    if bool((left < -1e-12).any()):
        raise ValueError(f"eta: got {eta}, want less: the step would add more noise than the next level holds")
    direction = left.clamp(min=0.0).sqrt()
    signal = d.next_alpha.sqrt()
    return _diffusion_table(d, a=signal * d.p + direction * d.r, b=signal * d.q + direction * d.w, tau=tau)


def vp_sde(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    eta: float,
    prediction_type: PredictionType = "epsilon",
    *,
    previous_timesteps: Tensor | Sequence[int] | None = None,
    final_alpha_cumprod: float = 1.0,
) -> TransitionTable:
    """Euler-Maruyama step of DanceGRPO's reverse SDE for variance-preserving diffusion (arXiv 2505.07818).

    `dz = [f z - (1 + eta^2) / 2 g^2 score] dt + eta g dw`, whose marginals do not depend on `eta`: `eta = 0` is the
    probability-flow ODE and `eta = 1` the reverse SDE. With `F = log(A' / A) / 2` the integral of `f` over the step,
    `g^2 |dt| = 2 F`. Arguments and errors as `ddim`.
    """
    d = _diffusion_schedule(alphas_cumprod, timesteps, prediction_type, previous_timesteps, final_alpha_cumprod)
    level = _check_level("eta", eta)
    growth = 0.5 * torch.log(d.next_alpha / d.alpha)
    score = -(1.0 + level**2) * growth / torch.sqrt(1.0 - d.alpha)
    return _diffusion_table(d, a=1.0 + growth + score * d.r, b=score * d.w, tau=level * torch.sqrt(2.0 * growth))


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


_Builders = dict[str, Callable[[float], TransitionTable]]


def _flow_builders(scheduler: Any) -> _Builders:
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError("scheduler: got stochastic_sampling=True, want it off and a sampler of this package")
    sigmas = scheduler.sigmas.to("cpu", torch.float64)
    return {
        "ode": lambda level: ode(sigmas),
        "dance_sde": lambda level: dance_sde(sigmas, level),
        "flow_sde": lambda level: flow_sde(sigmas, level),
        "cps": lambda level: cps(sigmas, level),
    }


def _diffusion_builders(scheduler: Any) -> _Builders:
    config = scheduler.config
    for name in ("clip_sample", "thresholding"):
        if config.get(name):
            raise ValueError(f"scheduler: got {name}=True, which is not affine; want it off")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("scheduler: got rescale_betas_zero_snr=True, whose first step has no signal; want it off")
    times = scheduler.timesteps.to("cpu")
    previous = times - config.num_train_timesteps // scheduler.num_inference_steps
    settings: dict[str, Any] = {
        "prediction_type": config.prediction_type,
        "previous_timesteps": previous,
        "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
    }
    return {
        "ddim": lambda level: ddim(scheduler.alphas_cumprod, times, level, **settings),
        "vp_sde": lambda level: vp_sde(scheduler.alphas_cumprod, times, level, **settings),
    }


def from_scheduler(
    scheduler: Any, sampler: str | None = None, noise_level: float = 0.0, window: Sequence[int] | None = None
) -> TransitionTable:
    """The table of a diffusers scheduler on which `set_timesteps` was called.

    Args:
        scheduler: `FlowMatchEulerDiscreteScheduler` or `DDIMScheduler`.
        sampler: for flow matching "ode" (default), "dance_sde", "flow_sde" or "cps"; for DDIM "ddim" (default),
            "vp_sde".
        noise_level: eta of the chosen sampler; the ODE takes none.
        window: step indices that stay stochastic; the others become the ODE (or DDIM with eta 0). Default: all.

    Raises:
        ValueError: another scheduler, a sampler that does not fit it, or a setting that makes its step not affine.
    """
    _check_level("noise_level", noise_level)
    name, kinds = type(scheduler).__name__, {base.__name__ for base in type(scheduler).__mro__}
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("scheduler: got one without timesteps, call set_timesteps first")
    if "FlowMatchEulerDiscreteScheduler" in kinds:
        builders = _flow_builders(scheduler)
    elif "DDIMScheduler" in kinds:
        builders = _diffusion_builders(scheduler)
    else:
        raise ValueError(f"scheduler: got {name}, want FlowMatchEulerDiscreteScheduler or DDIMScheduler")
    plain = next(iter(builders))
    chosen = plain if sampler is None else sampler
    if chosen not in builders:
        raise ValueError(f'sampler: got "{sampler}", want one of {list(builders)} for {name}')
    if chosen == "ode" and noise_level > 0:
        raise ValueError(f"noise_level: got {noise_level} for the ODE, want 0 or a sampler of {list(builders)[1:]}")
    table = builders[chosen](noise_level)
    return table if window is None else mixed(table, builders[plain](0.0), window)
