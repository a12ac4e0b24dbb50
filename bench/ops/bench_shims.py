"""The projects' step functions: what a call of theirs costs, of ours, and of what `dancegrpo-fast run` puts there.

    peer     the project's function (its double of `tests/compat/peers`)
    ours     `dancegrpo_fast.compat`
    run      after its first calls, which are compared, and without the audit of the first update

Each in a rollout, in a replay that a gradient can be taken of, and with that gradient, on the shapes of the scripts'
latents; `host` is so small that only Python and dispatch are left. On a GPU it is the time that a call costs the host.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bench.clocks import Run
from bench.place import Place, place_of
from bench.rows import Row
from bench.turns import Contest, cross
from dancegrpo_fast.dropin.replaced import Replacements
from dancegrpo_fast.dropin.settings import Settings
from tests.compat.cases import ddim_scheduler, find, ours
from tests.compat.peers import dancegrpo as dance
from tests.compat.peers import (
    ddpo,
    diffusion_nft,
    flow_factory,
    flow_grpo,
    flow_grpo_wan,
    mixgrpo,
    pref_grpo,
    verl_omni,
)
from tests.tolerances import chain_error

# FLUX at 256, 720 and 1024 pixels, Stable Diffusion, SD3 at 512 pixels; Wan at 832 x 480, 81 frames.
HOST, WAYS = "host", ("rollout", "replay", "backward")
SHAPES = {
    HOST: (1, 4, 4, 4),
    "SD": (1, 4, 64, 64),
    "FLUX": (1, 2025, 64),
    "SD3": (2, 16, 64, 64),
    "video": (1, 16, 21, 60, 104),
}
STEP = 3
# `run` times the original beside ours in some of its first calls: so many, or so many seconds, are left out.
WARM_CALLS, WARM_SECONDS = 300, 2.0


Call = Callable[[Callable[..., Any], Tensor, Tensor, Tensor | None], Any]


@dataclass(frozen=True)
class Shim:
    """Ours, a call of it or of the peer's, the place of the score, and the peer with the class that it belongs to."""

    ours: str
    call: Call
    score: int
    peer: Any
    owner: str | None = None
    outputs: torch.dtype = torch.bfloat16


def _shims() -> dict[str, Shim]:
    """Name -> function; outputs are bfloat16 as under autocast, float32 where a script casts them before."""
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(16)
    sigmas, diffusion, wide = flow.sigmas, ddim_scheduler(), torch.float32
    factory, verl = flow_factory.FlowMatchEulerDiscreteSDEScheduler, verl_omni.FlowMatchSDEDiscreteScheduler
    euler = factory(shift=3.0)
    euler.set_timesteps(16)
    at, following = flow.timesteps[STEP : STEP + 1], flow.timesteps[STEP + 1 : STEP + 2]
    options = {"timestep_next": following, "noise_level": 0.7, "return_dict": False}

    def indexed(level: float, *rest: Any) -> Call:
        return lambda f, v, x, n: f(v, x, level, sigmas, STEP, n, *rest)

    def scheduled(*rest: Any) -> Call:
        return lambda f, v, x, n: f(flow, v, at.expand(len(x)), x, *rest, n)

    def ddim(f: Any, v: Tensor, x: Tensor, n: Tensor | None) -> Any:
        return f(diffusion, v, torch.tensor([501]).expand(len(x)), x, 1.0, prev_sample=n)

    def sampled(f: Any, v: Tensor, x: Tensor, n: Tensor | None) -> Any:
        return f(flow, x, v, at.expand(len(x)), prev_sample=n)

    def stepped(f: Any, v: Tensor, x: Tensor, n: Tensor | None) -> Any:
        return f(euler, v, at, x, n, **options)

    sde, wan = "sde_step_with_logprob", "wan_sde_step_with_logprob"
    mix, pref, nft = mixgrpo.flow_grpo_step, pref_grpo.flow_grpo_step, diffusion_nft.flow_grpo_step
    return {
        "DanceGRPO flux_step": Shim("dancegrpo:flux_step", indexed(0.3, True, True), 2, dance.flux_step),
        "DDPO ddim_step_with_logprob": Shim("ddpo:ddim_step_with_logprob", ddim, 1, ddpo.ddim_step_with_logprob),
        f"Flow-GRPO {sde}": Shim(f"flow_grpo:{sde}", scheduled(0.7), 1, flow_grpo.sde_step_with_logprob),
        f"Flow-GRPO {sde}, Wan": Shim(
            f"flow_grpo:{wan}", scheduled(), 1, flow_grpo_wan.sde_step_with_logprob, outputs=wide
        ),
        "MixGRPO flow_grpo_step": Shim("mixgrpo:flow_grpo_step", indexed(0.7), 2, mix),
        "MixGRPO dance_grpo_step": Shim(
            "mixgrpo:dance_grpo_step", indexed(0.3, True, True), 2, mixgrpo.dance_grpo_step
        ),
        "Pref-GRPO flow_grpo_step": Shim("pref_grpo:flow_grpo_step", indexed(0.7, None, True), 2, pref),
        "DiffusionNFT flow_grpo_step": Shim("pref_grpo:flow_grpo_step", indexed(0.7), 2, nft, outputs=wide),
        "verl-omni sample_previous_step": Shim(
            f"verl_omni:{verl.__name__}.sample_previous_step",
            *(sampled, 1, verl.sample_previous_step, verl.__name__, wide),
        ),
        "Flow-Factory step": Shim("flow_factory:step", stepped, 3, factory.step, factory.__name__),
    }


SHIMS = _shims()


@dataclass(frozen=True)
class Case:
    """One function on one size, one way."""

    function: str
    size: str
    way: str

    def __str__(self) -> str:
        return f"{self.function}, {self.size}, {self.way}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every function on every size, in a dry run on the smallest."""
    dry = place_of(metafunc.config.getoption("--device")).dry
    cases = [
        pytest.param(Case(name, size, way), marks=[] if size == HOST else [pytest.mark.full])
        for size in ([HOST] if dry else SHAPES)
        for name in SHIMS
        for way in WAYS
    ]
    cross(metafunc, cases, ["peer", "ours", "run"])


def test_shim(case: Case, place: Place, contest: Any) -> None:
    """Three contenders."""
    contest(lambda: _functions(case, place))


def ways(shim: Shim, function: Callable[..., Any], inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Run]:
    """Way -> call."""
    x, v, after = inputs
    leaf = v.clone().requires_grad_()

    def rollout(i: int) -> Any:
        with torch.no_grad():
            return shim.call(function, v, x, None)

    def backward(i: int) -> None:
        shim.call(function, leaf, x, after)[shim.score].sum().backward()
        leaf.grad = None

    return dict(zip(WAYS, (rollout, lambda i: shim.call(function, leaf, x, after), backward), strict=True))


def _functions(case: Case, place: Place) -> Contest:
    shim, shape = SHIMS[case.function], SHAPES[case.size]
    generator = torch.Generator(place.device).manual_seed(0)
    x, v, after = (torch.randn(shape, generator=generator, device=place.device) for _ in range(3))
    inputs = (x, v.to(shim.outputs), after)
    module, _, attribute = shim.ours.partition(":")
    stand_in = Replacements(Settings(), lambda text: None, audited=False).stand_in(shim.peer, shim.owner, "bench")
    functions = {"peer": shim.peer, "ours": find(ours(module), attribute), "run": stand_in}
    found = {which: ways(shim, function, inputs) for which, function in functions.items()}

    def scores(which: str) -> Tensor:
        result: Tensor = shim.call(functions[which], inputs[1], x, after)[shim.score]
        return result.detach()

    def check(name: str) -> None:
        want, given = scores("peer"), scores(name)
        assert float((given - want).abs().max()) <= chain_error(want, torch.bfloat16), "its score is another one"
        if name == "run" and not place.dry:
            begin = time.perf_counter()
            for call in range(WARM_CALLS):
                found["run"][case.way](call)
                if time.perf_counter() - begin > WARM_SECONDS:
                    break

    def info(name: str) -> Row:
        return {"op": "shim", "function": case.function, "shape": list(shape), "size": case.size, "way": case.way}

    return Contest({which: every[case.way] for which, every in found.items()}, check, info, place.host_clock)
