"""Every replaced function and its peer, called alike."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dancegrpo_fast.transitions import shifted_sigmas

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = "dancegrpo ddpo flow_grpo mixgrpo pref_grpo verl_omni flow_factory diffusion_nft flow_grpo_wan"
PEERS = {name: importlib.import_module(f"{__package__}.peers.{name}") for name in NAMES.split()}
SIGMAS = shifted_sigmas(4, 3.0).to(F32)
TIMES = SIGMAS[:-1] * 1000
SHAPE = (8, 4, 6, 5)


def ours(name: str) -> ModuleType:
    return importlib.import_module(f"dancegrpo_fast.compat.{name}")


def flow_scheduler(dtype: torch.dtype = F32, sigmas: Tensor = SIGMAS) -> SimpleNamespace:
    """What the peers read of a flow-matching scheduler."""
    times = sigmas[:-1] * 1000
    return SimpleNamespace(
        sigmas=sigmas.to(dtype),
        timesteps=times,
        step_index=1,
        index_for_timestep=lambda t: int((times == t).nonzero()[0]),
        is_eval=False,
        noise_level=0.7,
        dynamics_type="Flow-SDE",
        current_sde_steps=torch.tensor([0, 1, 2]),
    )


def ddim_scheduler(dtype: torch.dtype = F32, **config: Any) -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False, **config)
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    return scheduler


def find(module: ModuleType, name: str) -> Callable[..., Any]:
    """A function by its qualified name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


@dataclass(frozen=True)
class Case:
    """A function at one setting, ours and the peer's: `call(function, output, latents, next or None, schedule dtype)`.

    `options` make ours the peer's state. With reference rounding next latents are the peer's to the bit, unless
    `same_bits` is False; with `same_scores` the log-probability is, too.
    """

    ours_name: str
    peer_name: str
    call: Callable[..., Any]
    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    latents: torch.dtype = F32
    same_bits: bool = True
    same_scores: bool = False

    def _run(self, function: Callable[..., Any], *tensors: Tensor | None, dtype: torch.dtype = F32, **settings: Any):
        found = self.call(function, *tensors, dtype, **settings)
        return dict(zip(self.names, found, strict=True))

    @property
    def place(self) -> tuple[Any, str]:
        """Where the peer's function is, a module or a class, and under which name."""
        module, _, name = self.peer_name.partition(":")
        home, _, last = name.rpartition(".")
        return (find(PEERS[module], home) if home else PEERS[module]), last

    def ours(self, *tensors: Tensor | None, **settings: Any) -> dict[str, Tensor]:
        module, _, name = self.ours_name.partition(":")
        return self._run(find(ours(module), name), *tensors, **self.options, **settings)

    def peer(self, *tensors: Tensor | None, **settings: Any) -> dict[str, Tensor]:
        home, name = self.place
        return self._run(getattr(home, name), *tensors, **settings)


THREE = ("next", "denoised", "log_prob")
FIVE = (*THREE, "mean", "std")
STATS = (*FIVE, "dt")
FLOW = ("next", "log_prob", "mean", "std", "sqrt_dt")
FACTORY = ("next", "mean", "noise_pred", "log_prob", "std", "dt")
UNIPC = ("next", "log_prob", "mean", "std", "dt")


def _by_index(level: float, *rest: Any, step: int = 1) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        return f(v, x, level, SIGMAS.to(dtype), step, after, *rest, **settings)

    return call


_dance, _flow = functools.partial(_by_index, 0.3), functools.partial(_by_index, 0.7, None)


def _flow_grpo(steps: list[int], **fixed: Any) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        return f(flow_scheduler(dtype), v, TIMES[steps], x, prev_sample=after, **fixed, **settings)

    return call


def _flow_grpo_ode(steps: list[int]) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        other = draw(BF16, 9).to(v.dtype)  # what moves the latents; the score is differentiable in the other output
        fixed = {"prev_sample": after, "return_sqrt_dt": True}
        return f(flow_scheduler(dtype), other, v, TIMES[steps], x, **fixed, **settings)

    return call


def _verl(kind: str, steps: list[int] | None, normalized: bool = True) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        times = None if steps is None else TIMES[steps]
        fixed = {"sde_type": kind, "return_sqrt_dt": True, "include_logprob_normalizer": normalized}
        # float32 is asserted
        return f(flow_scheduler(dtype), x, v.to(x.dtype), times, prev_sample=after, **fixed, **settings)

    return call


def _factory(kind: str, steps: list[int], following: bool = False, **fixed: Any) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        times = (TIMES * 1.0).to(dtype)
        given = dict(fixed)
        if following:
            given["timestep_next"] = torch.cat([times[1:], times.new_zeros(1)])[steps]
        chosen = {"return_dict": False, "dynamics_type": kind}
        return f(flow_scheduler(dtype), v, TIMES[steps] if not following else times[steps], x, after, **chosen, **given,
                 **settings)  # fmt: skip

    return call


def _ddpo(kind: str) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        times = torch.tensor([901, 701, 501, 401, 301, 201, 101, 801])
        return f(ddim_scheduler(dtype, prediction_type=kind), v, times, x, 1.0, prev_sample=after, **settings)

    return call


EACH = [0, 1, 2, 0, 1, 2, 2, 1]
FLUX, MIX, PREF, NFT = "dancegrpo:flux_step", "mixgrpo:", "pref_grpo:", "diffusion_nft:"
OLD_FLUX, SOLVER = "dancegrpo:flux_step_until_2025_08", {"grpo": True, "sde_solver": True}
SDE, WAN, WAN_PEER = "flow_grpo:sde_step_with_logprob", "flow_grpo:wan_sde_step_with_logprob", "flow_grpo_wan:sde_step"
VERL = "verl_omni:FlowMatchSDEDiscreteScheduler.sample_previous_step"
STEP, UNI = "flow_factory:step", "flow_factory:unipc_noise_pred_step"
NEWEST = "flow_factory:FlowMatchEulerDiscreteSDEScheduler.step"


def _state(word: str, peer: str, *rest: Any, **more: Any) -> Case:
    return Case("flow_factory:noise_pred_step", f"flow_factory:{peer}.step", *rest, {"state": word}, **more)


CASES = {
    "dancegrpo": Case(FLUX, FLUX, _dance(True, True), THREE),
    "dancegrpo at 1": Case(FLUX, FLUX, _dance(True, True, step=0), THREE),
    "dancegrpo last": Case(FLUX, FLUX, _dance(True, True, step=3), THREE),
    "dancegrpo, no SDE": Case(FLUX, FLUX, _dance(True, False), THREE),
    "dancegrpo until 2025-08": Case(FLUX, OLD_FLUX, _dance(True, True), THREE, {"normalized": False}),
    "ddpo": Case(
        "ddpo:ddim_step_with_logprob",
        "ddpo:ddim_step_with_logprob",
        _ddpo("epsilon"),
        ("next", "log_prob"),
        same_bits=False,
    ),
    "flow_grpo sde": Case(SDE, SDE, _flow_grpo(EACH, return_sqrt_dt=True), FLOW),
    "flow_grpo sde, one step": Case(SDE, SDE, _flow_grpo([0], return_sqrt_dt=True), FLOW),
    "flow_grpo cps": Case(SDE, SDE, _flow_grpo(EACH, sde_type="cps", return_sqrt_dt=True), FLOW),
    "flow_grpo ode": Case(
        "flow_grpo:ode_step_with_logprob", "flow_grpo:ode_step_with_logprob", _flow_grpo_ode(EACH), FLOW
    ),
    "flow_cps": Case(SDE, "flow_grpo:sde_step_of_flow_cps", _flow_grpo([1]), FLOW[:4], {"sde_type": "cps"}),
    "wan": Case(WAN, f"{WAN_PEER}_with_logprob", _flow_grpo(EACH), FLOW[:4]),
    "wan, statistics": Case(WAN, f"{WAN_PEER}_with_logprob", _flow_grpo([1], return_dt_and_std_dev_t=True), FLOW),
    "wan, ODE": Case(WAN, f"{WAN_PEER}_with_logprob", _flow_grpo([1], determistic=True), FLOW[:4]),
    "flow_grpo 2025-05": Case(WAN, f"{WAN_PEER}_2025_05", _flow_grpo(EACH), FLOW[:4], {"level": 0.7}),
    "mixgrpo flow": Case(MIX + "flow_grpo_step", MIX + "flow_grpo_step", _flow(), FIVE),
    "mixgrpo flow at 1": Case(MIX + "flow_grpo_step", MIX + "flow_grpo_step", _flow(step=0), FIVE),
    "mixgrpo flow, ODE": Case(MIX + "flow_grpo_step", MIX + "flow_grpo_step", _flow(True), FIVE),
    "mixgrpo dance": Case(MIX + "dance_grpo_step", MIX + "dance_grpo_step", _dance(True, True), THREE),
    "mixgrpo dance, ODE": Case(MIX + "dance_grpo_step", MIX + "dance_grpo_step", _dance(True, False), THREE),
    "nft flow": Case(PREF + "flow_grpo_step", NFT + "flow_grpo_step", _flow(), THREE),
    "nft dance": Case(MIX + "dance_grpo_step", NFT + "dance_grpo_step", _dance(), THREE, SOLVER),
    "pref_grpo flow": Case(PREF + "flow_grpo_step", PREF + "flow_grpo_step", _flow(), THREE),
    "pref_grpo flow, statistics": Case(PREF + "flow_grpo_step", PREF + "flow_grpo_step", _flow(True), STATS),
    "pref_grpo dance": Case(PREF + "dance_grpo_step", PREF + "dance_grpo_step", _dance(True, True), THREE),
    "pref_grpo dance, statistics": Case(
        PREF + "dance_grpo_step", PREF + "dance_grpo_step", _dance(True, True, True), STATS
    ),
    "verl_omni sde": Case(VERL, VERL, _verl("sde", EACH), FLOW),
    "verl_omni sde, own step": Case(VERL, VERL, _verl("sde", None), FLOW),
    "verl_omni sde, unnormalized": Case(VERL, VERL, _verl("sde", [1], False), FLOW),
    "verl_omni cps": Case(VERL, VERL, _verl("cps", EACH), FLOW),
    "verl_omni dance": Case(VERL, VERL, _verl("dance_sde", EACH), FLOW),
    "flow_factory Flow-SDE": Case(STEP, NEWEST, _factory("Flow-SDE", EACH), FACTORY, same_scores=True),
    "flow_factory Flow-SDE, half": Case(
        STEP, NEWEST, _factory("Flow-SDE", EACH), FACTORY, latents=BF16, same_scores=True
    ),
    "flow_factory sigma_max": Case(STEP, NEWEST, _factory("Flow-SDE", [0], sigma_max=0.5), FACTORY, same_scores=True),
    "flow_factory next": Case(STEP, NEWEST, _factory("Flow-SDE", EACH, True, noise_level=0.7), FACTORY),
    "flow_factory Dance-SDE": Case(
        STEP, NEWEST, _factory("Dance-SDE", EACH, noise_level=0.3), FACTORY, same_scores=True
    ),
    "flow_factory CPS": Case(STEP, NEWEST, _factory("CPS", EACH), FACTORY, latents=BF16, same_scores=True),
    "flow_factory ODE": Case(STEP, NEWEST, _factory("ODE", EACH), FACTORY),
    "flow_factory 03-21": _state("2026-03-21", "Of2026March21", _factory("Dance-SDE", [1]), FACTORY, latents=BF16),
    "flow_factory 03-14": _state("2026-03-14", "Of2026March14", _factory("Dance-SDE", [1]), FACTORY, latents=BF16),
    "flow_factory 01": _state("2026-01", "Of2026January", _factory("Dance-SDE", [1]), FACTORY, latents=BF16),
    "flow_factory UniPC": Case(
        UNI, "flow_factory:UniPCMultistepSDEScheduler.step", _factory("Dance-SDE", EACH), UNIPC, {"state": "2026-03-21"}
    ),
}


def seeded(seed: int, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """What a call gives that starts from the same random numbers."""
    torch.manual_seed(seed)
    return call(*arguments, **settings)


def draw(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
