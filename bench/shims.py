"""`python -m bench.shims`: what the projects' step functions and ours cost, on the shapes that their scripts have."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

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

from .clocks import HostClock, Run, WallClock
from .harness import environment, interleave

# FLUX at 256, 720 and 1024 pixels, Stable Diffusion, SD3 at 512 pixels; Wan at 832 x 480, 81 frames.
SHAPES = {
    "host": (1, 4, 4, 4),
    "SD": (1, 4, 64, 64),
    "FLUX": (1, 2025, 64),
    "SD3": (2, 16, 64, 64),
    "video": (1, 16, 21, 60, 104),
}
STEP = 3
# `run` times the original beside ours in some of its first calls: so many, or so many seconds, are left out.
WARM_CALLS, WARM_SECONDS = 300, 2.0


@dataclass(frozen=True)
class Shim:
    """A peer's function, where it is defined, ours, and a call of either."""

    peer: Any
    owner: str | None
    ours: str
    call: Callable[[Callable[..., Any], Tensor, Tensor, Tensor | None], tuple[Any, ...]]
    score: int
    outputs: torch.dtype = torch.bfloat16


def shims() -> dict[str, Shim]:
    """Name -> function; outputs are bfloat16 as under autocast, float32 where a script casts them before."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(16)
    sigmas, diffusion = scheduler.sigmas, ddim_scheduler()
    euler = flow_factory.FlowMatchEulerDiscreteSDEScheduler(shift=3.0)
    euler.set_timesteps(16)
    at, following = scheduler.timesteps[STEP : STEP + 1], scheduler.timesteps[STEP + 1 : STEP + 2]
    trained = torch.tensor([501])
    verl = verl_omni.FlowMatchSDEDiscreteScheduler
    verl_name, wide = "FlowMatchSDEDiscreteScheduler", torch.float32
    factory = {"timestep_next": following, "noise_level": 0.7, "return_dict": False}
    return {
        "DanceGRPO flux_step": Shim(
            dance.flux_step,
            None,
            "dancegrpo:flux_step",
            lambda f, v, x, n: f(v, x, 0.3, sigmas, STEP, n, True, True),
            2,
        ),
        "DDPO ddim_step_with_logprob": Shim(
            ddpo.ddim_step_with_logprob,
            None,
            "ddpo:ddim_step_with_logprob",
            lambda f, v, x, n: f(diffusion, v, trained.expand(len(x)), x, 1.0, prev_sample=n),
            1,
        ),
        "Flow-GRPO sde_step_with_logprob": Shim(
            flow_grpo.sde_step_with_logprob,
            None,
            "flow_grpo:sde_step_with_logprob",
            lambda f, v, x, n: f(scheduler, v, at.expand(len(x)), x, 0.7, n),
            1,
        ),
        "Flow-GRPO sde_step_with_logprob, Wan": Shim(
            flow_grpo_wan.sde_step_with_logprob,
            None,
            "flow_grpo:wan_sde_step_with_logprob",
            lambda f, v, x, n: f(scheduler, v, at.expand(len(x)), x, n),
            1,
            wide,
        ),
        "MixGRPO flow_grpo_step": Shim(
            mixgrpo.flow_grpo_step, None, "mixgrpo:flow_grpo_step", lambda f, v, x, n: f(v, x, 0.7, sigmas, STEP, n), 2
        ),
        "MixGRPO dance_grpo_step": Shim(
            mixgrpo.dance_grpo_step,
            None,
            "mixgrpo:dance_grpo_step",
            lambda f, v, x, n: f(v, x, 0.3, sigmas, STEP, n, True, True),
            2,
        ),
        "Pref-GRPO flow_grpo_step": Shim(
            pref_grpo.flow_grpo_step,
            None,
            "pref_grpo:flow_grpo_step",
            lambda f, v, x, n: f(v, x, 0.7, sigmas, STEP, n, None, True),
            2,
        ),
        "DiffusionNFT flow_grpo_step": Shim(
            diffusion_nft.flow_grpo_step,
            None,
            "pref_grpo:flow_grpo_step",
            lambda f, v, x, n: f(v, x, 0.7, sigmas, STEP, n),
            2,
            wide,
        ),
        "verl-omni sample_previous_step": Shim(
            verl.sample_previous_step,
            verl_name,
            f"verl_omni:{verl_name}.sample_previous_step",
            lambda f, v, x, n: f(scheduler, x, v, at.expand(len(x)), prev_sample=n),
            1,
            wide,
        ),
        "Flow-Factory step": Shim(
            flow_factory.FlowMatchEulerDiscreteSDEScheduler.step,
            "FlowMatchEulerDiscreteSDEScheduler",
            "flow_factory:step",
            lambda f, v, x, n: f(euler, v, at, x, n, **factory),
            3,
        ),
    }


def ways(shim: Shim, function: Callable[..., Any], shape: tuple[int, ...], device: torch.device) -> dict[str, Run]:
    """A rollout, a replay that a gradient can be taken of, and the same with the gradient."""
    generator = torch.Generator(device).manual_seed(0)
    x, v, after = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    v = v.to(shim.outputs)
    leaf = v.clone().requires_grad_()

    def rollout(i: int) -> Any:
        with torch.no_grad():
            return shim.call(function, v, x, None)

    def backward(i: int) -> None:
        shim.call(function, leaf, x, after)[shim.score].sum().backward()
        leaf.grad = None

    return {"rollout": rollout, "replay": lambda i: shim.call(function, leaf, x, after), "backward": backward}


def measure(
    names: list[str], shapes: dict[str, tuple[int, ...]], rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows: microseconds a call of the peer's double, of ours, and of what `run` puts in its place."""
    clock = WallClock() if device.type == "cpu" else HostClock(torch.cuda.synchronize)
    for name, shim in shims().items():
        if names and name not in names:
            continue
        module, _, attribute = shim.ours.partition(":")
        # As after the first update, which is audited.
        stand_in = Replacements(Settings(), lambda text: None, audited=False).stand_in(shim.peer, shim.owner, "bench")
        functions = {"peer": shim.peer, "ours": find(ours(module), attribute), "run": stand_in}
        for word, shape in shapes.items():
            calls = {which: ways(shim, function, shape, device) for which, function in functions.items()}
            for way in ("rollout", "replay", "backward"):
                begin = time.perf_counter()
                for call in range(WARM_CALLS):
                    calls["run"][way](call)
                    if time.perf_counter() - begin > WARM_SECONDS:
                        break
                timings = interleave({which: found[way] for which, found in calls.items()}, rounds, clock=clock)
                row: dict[str, Any] = {"function": name, "shape": list(shape), "size": word, "way": way}
                for which, timing in timings.items():
                    row[f"us_{which}"], row[f"us_{which}_low"] = 1e3 * timing.median, 1e3 * timing.low
                yield row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.shims", description=__doc__)
    parser.add_argument("--only", action="append", default=[], choices=shims(), help="a function; repeat for several")
    parser.add_argument("--size", action="append", default=[], choices=SHAPES, help="of SHAPES; repeat for several")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default 11)")
    parser.add_argument("--threads", type=int, help="torch threads (default torch's own)")
    parser.add_argument("--device", default="cpu", help="cuda times what a call costs the host")
    parser.add_argument("--out", type=Path, help="also append rows as JSON lines")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = environment(device)
    print("  ".join(f"{k} {v}" for k, v in where.items()), flush=True)
    shapes = {word: shape for word, shape in SHAPES.items() if not options.size or word in options.size}
    print("\n| function | shape | call | peer, us | ours | under run | ours / peer |\n|---|---|---|---|---|---|---|")
    slower = 0
    for row in measure(options.only, shapes, options.rounds, device):
        share = row["us_ours"] / row["us_peer"]
        slower += row["us_run"] > row["us_peer"]
        sizes = "x".join(map(str, row["shape"]))
        times = " | ".join(f"{row[f'us_{which}']:,.0f}" for which in ("peer", "ours", "run"))
        print(f"| {row['function']} | {row['size']} {sizes} | {row['way']} | {times} | {share:.2f} |", flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps({"op": "shim", **row, **where}) + "\n")
    print(f"\n{slower} rows in which what `run` puts in place is slower than the peer")


if __name__ == "__main__":
    main()
