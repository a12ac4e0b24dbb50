"""Every replaced function and its peer, called alike."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dancegrpo_fast.transitions import shifted_sigmas

from .peers import dancegrpo, ddpo, flow_factory, flow_grpo, mixgrpo, pref_grpo, verl_omni

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PEERS = {m.__name__.rpartition(".")[2]: m for m in (dancegrpo, ddpo, flow_grpo, mixgrpo, pref_grpo, verl_omni)}
PEERS["flow_factory"] = flow_factory
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


@dataclass(frozen=True)
class Case:
    """A peer's function at one setting: `call(module, output, latents, next or None, dtype of the schedule)`."""

    module: str
    call: Callable[..., Any]
    names: tuple[str, ...]
    same_bits: bool = False  # with reference rounding, from the same noise, the next latents are the peer's

    def run(self, module: ModuleType, *tensors: Tensor | None, dtype: torch.dtype = F32, **settings: Any):
        found = self.call(module, *tensors, dtype, **settings)
        return dict(zip(self.names, found, strict=True))

    def ours(self, *tensors: Tensor | None, **settings: Any) -> dict[str, Tensor]:
        return self.run(ours(self.module), *tensors, **settings)

    def peer(self, *tensors: Tensor | None, **settings: Any) -> dict[str, Tensor]:
        return self.run(PEERS[self.module], *tensors, **settings)


THREE = ("next", "denoised", "log_prob")
STATS = (*THREE, "mean", "std", "dt")
FLOW = ("next", "log_prob", "mean", "std", "sqrt_dt")
FACTORY = ("next", "mean", "noise_pred", "log_prob", "std", "dt")


def _dance(function: str, sde_solver: bool, *rest: Any, step: int = 1) -> Callable[..., Any]:
    def call(m: ModuleType, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        return getattr(m, function)(v, x, 0.3, SIGMAS.to(dtype), step, after, True, sde_solver, *rest, **settings)

    return call


def _flow(*rest: Any, step: int = 1) -> Callable[..., Any]:
    def call(m: ModuleType, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        return m.flow_grpo_step(v, x, 0.7, SIGMAS.to(dtype), step, after, None, *rest, **settings)

    return call


def _flow_grpo(kind: str, steps: list[int]) -> Callable[..., Any]:
    def call(m: ModuleType, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        times = TIMES[steps]
        return m.sde_step_with_logprob(
            flow_scheduler(dtype), v, times, x, 0.7, after, sde_type=kind, return_sqrt_dt=True, **settings
        )

    return call


def _verl(kind: str, steps: list[int] | None, normalized: bool = True) -> Callable[..., Any]:
    def call(m: ModuleType, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        return m.FlowMatchSDEDiscreteScheduler.sample_previous_step(
            flow_scheduler(dtype),
            x,
            v.to(x.dtype),  # float32 is asserted
            None if steps is None else TIMES[steps],
            prev_sample=after,
            sde_type=kind,
            return_sqrt_dt=True,
            include_logprob_normalizer=normalized,
            **settings,
        )

    return call


def _factory(kind: str, steps: list[int], **fixed: Any) -> Callable[..., Any]:
    def call(m: ModuleType, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        return m.FlowMatchEulerDiscreteSDEScheduler.step(
            flow_scheduler(dtype), v, TIMES[steps], x, after, return_dict=False, dynamics_type=kind, **fixed, **settings
        )

    return call


def _ddpo(kind: str) -> Callable[..., Any]:
    def call(m: ModuleType, v: Tensor, x: Tensor, after: Tensor | None, dtype: torch.dtype, **settings: Any) -> Any:
        times = torch.tensor([901, 701, 501, 401, 301, 201, 101, 801])
        scheduler = ddim_scheduler(dtype, prediction_type=kind)
        return m.ddim_step_with_logprob(scheduler, v, times, x, 1.0, prev_sample=after, **settings)

    return call


EACH = [0, 1, 2, 0, 1, 2, 2, 1]
CASES = {
    "dancegrpo": Case("dancegrpo", _dance("flux_step", True), THREE),
    "dancegrpo at 1": Case("dancegrpo", _dance("flux_step", True, step=0), THREE),
    "dancegrpo last": Case("dancegrpo", _dance("flux_step", True, step=3), THREE),
    "dancegrpo, no SDE": Case("dancegrpo", _dance("flux_step", False), THREE, same_bits=True),
    "ddpo": Case("ddpo", _ddpo("epsilon"), ("next", "log_prob")),
    "flow_grpo sde": Case("flow_grpo", _flow_grpo("sde", EACH), FLOW, same_bits=True),
    "flow_grpo sde, one step": Case("flow_grpo", _flow_grpo("sde", [0]), FLOW, same_bits=True),
    "flow_grpo cps": Case("flow_grpo", _flow_grpo("cps", EACH), FLOW),
    "mixgrpo flow": Case("mixgrpo", _flow(), (*THREE, "mean", "std"), same_bits=True),
    "mixgrpo flow at 1": Case("mixgrpo", _flow(step=0), (*THREE, "mean", "std"), same_bits=True),
    "mixgrpo flow, ODE": Case("mixgrpo", _flow(True), (*THREE, "mean", "std"), same_bits=True),
    "mixgrpo dance": Case("mixgrpo", _dance("dance_grpo_step", True), THREE),
    "mixgrpo dance, ODE": Case("mixgrpo", _dance("dance_grpo_step", False), THREE, same_bits=True),
    "pref_grpo flow": Case("pref_grpo", _flow(), THREE, same_bits=True),
    "pref_grpo flow, statistics": Case("pref_grpo", _flow(True), STATS, same_bits=True),
    "pref_grpo dance": Case("pref_grpo", _dance("dance_grpo_step", True), THREE),
    "pref_grpo dance, statistics": Case("pref_grpo", _dance("dance_grpo_step", True, True), STATS),
    "verl_omni sde": Case("verl_omni", _verl("sde", EACH), FLOW, same_bits=True),
    "verl_omni sde, own step": Case("verl_omni", _verl("sde", None), FLOW, same_bits=True),
    "verl_omni sde, unnormalized": Case("verl_omni", _verl("sde", [1], False), FLOW, same_bits=True),
    "verl_omni cps": Case("verl_omni", _verl("cps", EACH), FLOW),
    "verl_omni dance": Case("verl_omni", _verl("dance_sde", EACH), FLOW),
    "flow_factory Flow-SDE": Case("flow_factory", _factory("Flow-SDE", EACH), FACTORY, same_bits=True),
    "flow_factory sigma_max": Case("flow_factory", _factory("Flow-SDE", [0], sigma_max=0.5), FACTORY, same_bits=True),
    "flow_factory Dance-SDE": Case("flow_factory", _factory("Dance-SDE", EACH, noise_level=0.3), FACTORY),
    "flow_factory CPS": Case("flow_factory", _factory("CPS", EACH), FACTORY),
    "flow_factory ODE": Case("flow_factory", _factory("ODE", EACH), FACTORY, same_bits=True),
}


def draw(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
