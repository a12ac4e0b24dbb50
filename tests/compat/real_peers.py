"""The projects' own step functions beside ours: `DGF_PEERS=folder python -m tests.compat.real_peers` prints a table.

The folder has checkouts under their repositories' names. A function is cut out of its file, at a commit where one is
given, and run with what its module imports of torch and diffusers; nothing else of the project is needed.
"""

import __future__

import ast
import functools
import logging
import math
import os
import subprocess
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .cases import BF16, F32, SHAPE, ddim_scheduler, draw, find, ours

FOLDER = os.environ.get("DGF_PEERS")


@dataclass(frozen=True)
class Real:
    """A function of a project at a commit (None: as checked out), and ours that is to do the same.

    `call(function, output, latents, next, step, **settings)` gives its results as a tuple, `score` is the place of the
    log-probability among them.
    """

    project: str
    path: str
    name: str
    ours_name: str
    call: Callable[..., tuple[Any, ...]]
    score: int
    commit: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    latents: torch.dtype = F32
    shape: tuple[int, ...] = SHAPE
    steps: tuple[int, ...] = (0, 1, 3)

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.project, self.commit or "", self.name, self.note) if part)

    def theirs(self) -> Callable[..., Any] | None:
        """The project's function."""
        text = _source(self.project, self.path, self.commit)
        if text is None:
            return None
        *_, name = self.name.split(".")
        wanted = {name, "_left_broadcast", "_get_variance", "to_broadcast_tensor"}
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name in wanted]
        for node in nodes:
            node.decorator_list = []
        space: dict[str, Any] = {n: getattr(typing, n) for n in typing.__all__}
        space |= {"torch": torch, "math": math, "randn_tensor": randn_tensor, "DDIMScheduler": DDIMScheduler}
        space |= {"logger": logging.getLogger("peer"), "to_broadcast_tensor": _to_broadcast}
        code = compile(ast.Module(nodes, []), self.path, "exec", __future__.annotations.compiler_flag, True)
        exec(code, space)
        return space.get(name)

    def mine(self) -> Callable[..., Any]:
        module, _, name = self.ours_name.partition(":")
        return find(ours(module), name)


@functools.cache
def _source(project: str, path: str, commit: str | None) -> str | None:
    """A file's text, None where it cannot be had."""
    assert FOLDER is not None
    root = Path(FOLDER) / project
    if commit is None:
        return (root / path).read_text() if (root / path).is_file() else None
    command = ["git", "-C", str(root), "show", f"{commit}:{path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def _to_broadcast(value: Any, like: Tensor) -> Tensor:
    value = torch.as_tensor(value).reshape(-1).to(like)
    return value.expand(len(like)).reshape(-1, *(1,) * (like.ndim - 1))


def _by_index(level: float, *rest: Any) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, step: int, **settings: Any) -> Any:
        return f(v, x, level, SIGMAS, step, after, *rest, **settings)

    return call


_flux, _flow = functools.partial(_by_index, 0.3), functools.partial(_by_index, 0.7, None)


def _scheduled(make: Callable[[], Any], **fixed: Any) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, step: int, **settings: Any) -> Any:
        scheduler = make()
        return f(scheduler, v, scheduler.timesteps[step : step + 1], x, prev_sample=after, **fixed, **settings)

    return call


def _ode(f: Any, v: Tensor, x: Tensor, after: Tensor | None, step: int, **settings: Any) -> Any:
    scheduler = flow()
    time = scheduler.timesteps[step : step + 1]
    return f(scheduler, draw(v.dtype, 9), v, time, x, prev_sample=after, return_sqrt_dt=True, **settings)


def _verl(kind: str) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, step: int, **settings: Any) -> Any:
        scheduler = flow()
        time = scheduler.timesteps[step : step + 1]
        fixed = {"prev_sample": after, "sde_type": kind, "return_sqrt_dt": True, "noise_level": 0.6}
        return f(scheduler, x, v.float(), time, **fixed, **settings)

    return call


def _factory(kind: str, integers: bool = False) -> Callable[..., Any]:
    def call(f: Any, v: Tensor, x: Tensor, after: Tensor | None, step: int, **settings: Any) -> Any:
        scheduler = unipc() if integers else flow()
        times = scheduler.timesteps
        following = torch.cat([times[1:], times.new_zeros(1)])[step : step + 1]
        scheduler = SimpleNamespace(
            sigmas=scheduler.sigmas, timesteps=times, is_eval=False, dynamics_type=kind, noise_level=0.7
        )
        time = times[step : step + 1]
        fixed = {"timestep_next": following, "noise_level": 0.6, "return_dict": False}
        return f(scheduler, v, time, x, after, **fixed, **settings)

    return call


def _ddim(f: Any, v: Tensor, x: Tensor, after: Tensor | None, step: int, **settings: Any) -> Any:
    return f(ddim_scheduler(), v, torch.full((len(x),), 901 - 300 * step), x, 1.0, prev_sample=after, **settings)


def flow() -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    return scheduler


def unipc() -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.numpy()  # diffusers makes it an array with a warning
    scheduler.set_timesteps(4)
    return scheduler


SIGMAS = flow().sigmas
_FLUX, _DDIM = "dancegrpo:flux_step", "ddpo:ddim_step_with_logprob"
_ODE = "flow_grpo:ode_step_with_logprob"
_SDE, _WAN = "flow_grpo:sde_step_with_logprob", "flow_grpo:wan_sde_step_with_logprob"
_SD3_FILE = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
_WAN_FILE = "flow_grpo/diffusers_patch/wan_pipeline_with_logprob.py"
_DDPO_FILE = "ddpo_pytorch/diffusers_patch/ddim_with_logprob.py"
_NEWER_FILE = "sd3_sde_with_logprob.py"
_SD_FILE = "fastvideo/models/stable_diffusion/ddim_with_logprob.py"
_MIX_FILE, _PREF_FILE = "fastvideo/utils/sampling_utils.py", "fastvideo/grpo/steps.py"
_NFT_FILE = "flow_grpo/diffusers_patch/solver.py"
_VERL_FILE = "verl_omni/pipelines/schedulers/flow_match_sde.py"
_VERL_OURS = "verl_omni:FlowMatchSDEDiscreteScheduler.sample_previous_step"
_EULER_FILE = "src/flow_factory/scheduler/flow_match_euler_discrete.py"
_UNIPC_FILE = "src/flow_factory/scheduler/unipc_multistep.py"
_SOLVER = {"grpo": True, "sde_solver": True}
_NAME = "sde_step_with_logprob"


def _factory_rows() -> list[Real]:
    states = (("a0b2bc5", "2026-03-21"), ("5cfd422", "2026-03-14"), ("9274856", "2026-01"))
    rows = []
    for commit, state in states:
        for kind in ("Flow-SDE", "Dance-SDE", "CPS", "ODE"):
            options = {"state": state, "dynamics_type": kind}
            for file, ours_name, integers, score in (
                (_EULER_FILE, "flow_factory:noise_pred_step", False, 3),
                (_UNIPC_FILE, "flow_factory:unipc_noise_pred_step", True, 1),
            ):
                name = "UniPC.step" if integers else "step"
                call = _factory(kind, integers)
                # The last step of CPS has no noise: theirs scores its rounding, ours is 0.
                more = {"steps": (0, 1, 2)} if kind == "CPS" else {}
                for word, dtype in (("float32", F32), ("bfloat16", BF16)):
                    fixed = ("Flow-Factory", file, name, ours_name, call, score, commit, options, f"{kind}, {word}")
                    rows.append(Real(*fixed, latents=dtype, **more))
    return rows


ROWS = [
    *(
        Real("DanceGRPO", f"fastvideo/train_grpo_{file}.py", "flux_step", _FLUX, _flux(True, True), 2, note=file)
        for file in ("flux", "flux_lora", "hunyuan", "skyreels_i2v", "qwenimage", "qwenimage_edit", "wan_2_1")
    ),
    Real("DanceGRPO", "fastvideo/train_grpo_flux.py", "flux_step", _FLUX, _flux(True, False), 2, note="no SDE"),
    *(
        Real("DanceGRPO", "fastvideo/train_grpo_flux.py", "flux_step", _FLUX, _flux(True, True), 2, commit, options)
        for commit, options in (("2145e4f", {"normalized": False}), ("93ec253", {"normalized": False}), ("ff7bee1", {}))
    ),
    Real("DanceGRPO", _SD_FILE, "ddim_step_with_logprob", _DDIM, _ddim, 1),
    Real("ddpo-pytorch", _DDPO_FILE, "ddim_step_with_logprob", _DDIM, _ddim, 1),
    Real("Pref-GRPO", _SD_FILE, "ddim_step_with_logprob", _DDIM, _ddim, 1),
    Real("flow_grpo", _SD3_FILE, _NAME, _SDE, _scheduled(flow), 1),
    Real("flow_grpo", _SD3_FILE, _NAME, _WAN, _scheduled(flow), 1, "fc412d2", {"level": 0.7}),
    Real("flow_grpo-54809b5", _NEWER_FILE, _NAME, _SDE, _scheduled(flow, return_sqrt_dt=True), 1),
    Real("flow_grpo-54809b5", _NEWER_FILE, _NAME, _SDE, _scheduled(flow, sde_type="cps"), 1, note="cps"),
    Real("flow_grpo-54809b5", _NEWER_FILE, "ode_step_with_logprob", "flow_grpo:ode_step_with_logprob", _ode, 1),
    Real("FlowCPS", _SD3_FILE, _NAME, _SDE, _scheduled(flow), 1, None, {"sde_type": "cps"}),
    *(
        Real("FlowCPS", _WAN_FILE, _NAME, _WAN, _scheduled(make, **fixed), 1, note=note, shape=(4, 2, 3, 4, 5))
        for make, fixed, note in (
            (unipc, {}, "Wan, UniPC"),
            (flow, {"return_dt_and_std_dev_t": True}, "Wan, Euler"),
            (unipc, {"determistic": True}, "Wan, ODE"),
        )
    ),
    Real("MixGRPO", _MIX_FILE, "flow_grpo_step", "mixgrpo:flow_grpo_step", _flow(), 2),
    Real("MixGRPO", _MIX_FILE, "flow_grpo_step", "mixgrpo:flow_grpo_step", _flow(True), 2, note="ODE"),
    Real("MixGRPO", _MIX_FILE, "dance_grpo_step", "mixgrpo:dance_grpo_step", _flux(True, True), 2),
    Real("MixGRPO", _MIX_FILE, "dance_grpo_step", "mixgrpo:dance_grpo_step", _flux(True, False), 2, note="ODE"),
    Real("Pref-GRPO", _PREF_FILE, "flow_grpo_step", "pref_grpo:flow_grpo_step", _flow(True), 2),
    Real("Pref-GRPO", _PREF_FILE, "dance_grpo_step", "pref_grpo:dance_grpo_step", _flux(True, True, True), 2),
    Real("DiffusionNFT", _NFT_FILE, "flow_grpo_step", "pref_grpo:flow_grpo_step", _flow(), 2),
    Real("DiffusionNFT", _NFT_FILE, "dance_grpo_step", "mixgrpo:dance_grpo_step", _flux(), 2, None, _SOLVER),
    *(
        Real("verl-omni", _VERL_FILE, "sample_previous_step", _VERL_OURS, _verl(kind), 1, note=kind)
        for kind in ("sde", "cps", "dance_sde")
    ),
    *_factory_rows(),
]


@dataclass
class Apart:
    """The largest differences between a project's function and ours, over steps; samples are drawn by one seed.

    `scale` and `score_scale` are the largest next latent and log-probability, `gradient` is relative to the largest.
    """

    next_latents: float = 0.0
    log_prob: float = 0.0
    scale: float = 0.0
    score_scale: float = 0.0
    others: float = 0.0
    gradient: float = 0.0
    ratio: float = 0.0
    ratio_theirs: float = 0.0


def measure(row: Real, theirs: Callable[..., Any], dtype: torch.dtype, rounding: str) -> Apart:
    """Over the first, an inner and the last step: a sample, its score, its gradient, and on-policy ratios."""
    apart, mine = Apart(), row.mine()
    fixed = {name: value for name, value in row.options.items() if name == "dynamics_type"}
    for step in row.steps:
        v, x = draw(dtype, step, row.shape), draw(row.latents, 9 + step, row.shape)

        def run(f: Any, output: Tensor, after: Tensor | None, x: Tensor = x, step: int = step) -> tuple[Any, ...]:
            torch.manual_seed(7)
            if f is mine:
                return row.call(f, output, x, after, step, **row.options, rounding=rounding)
            return row.call(f, output, x, after, step, **fixed)

        plain, found = run(theirs, v, None), run(mine, v, None)
        assert len(plain) == len(found) and [t.shape for t in plain] == [t.shape for t in found]
        assert [t.dtype for t in plain] == [t.dtype for t in found]
        apart.next_latents = max(apart.next_latents, _off(plain[0], found[0]))
        apart.scale = max(apart.scale, float(plain[0].abs().max()))
        apart.ratio = max(apart.ratio, _ratio(found, run(mine, v, found[0]), row.score))
        apart.ratio_theirs = max(apart.ratio_theirs, _ratio(plain, run(theirs, v, plain[0]), row.score))
        if not bool(plain[row.score].isfinite().all()):
            continue  # no noise: theirs is not a number, ours is 0
        scores = []
        for f in (theirs, mine):
            output = v.clone().requires_grad_()
            results = run(f, output, plain[0])
            grad = torch.zeros_like(output)
            if results[row.score].requires_grad:
                (grad,) = torch.autograd.grad(results[row.score].sum(), output)
            scores.append((results, grad))
        apart.score_scale = max(apart.score_scale, float(scores[0][0][row.score].detach().abs().max()))
        apart.log_prob = max(apart.log_prob, _off(scores[0][0][row.score], scores[1][0][row.score]))
        pairs = zip(scores[0][0], scores[1][0], strict=True)
        apart.others = max([apart.others, *(_off(a, b) for i, (a, b) in enumerate(pairs) if i not in (0, row.score))])
        apart.gradient = max(apart.gradient, _off(scores[0][1], scores[1][1]) / float(scores[0][1].abs().max() + 1e-30))
    return apart


def _off(first: Tensor, second: Tensor) -> float:
    return float((first.detach().double() - second.detach().double()).abs().max())


def _ratio(rollout: tuple[Any, ...], replay: tuple[Any, ...], place: int) -> float:
    off = (torch.exp(replay[place] - rollout[place]) - 1).abs()
    return float(off[off.isfinite()].max()) if bool(off.isfinite().any()) else 0.0


def main() -> None:
    """Prints a row for each function and dtype, by both roundings."""
    print("| function | output | next latents, exact | next latents, reference | log-prob, exact | reference |"
          " gradient, reference | ratio - 1, theirs | ours |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        theirs = row.theirs()
        if theirs is None:
            print(f"| {row.label} | not to be had |")
            continue
        for dtype in (F32, BF16):
            exact, reference = (measure(row, theirs, dtype, rounding) for rounding in ("exact", "reference"))
            numbers = (exact.next_latents, reference.next_latents, exact.log_prob, reference.log_prob)
            numbers += (reference.gradient, reference.ratio_theirs, max(exact.ratio, reference.ratio))
            shown = " | ".join("0" if n == 0 else f"{n:.1e}" for n in numbers)
            print(f"| {row.label} | {str(dtype).removeprefix('torch.')} | {shown} |")


if __name__ == "__main__":
    main()
