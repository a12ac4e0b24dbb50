"""Small doubles of the engines, written from their interfaces, and the engines' own sources where they can be had."""

import importlib
import importlib.util
import math
import os
import sys
from abc import ABC
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import torch_utils

from ..compat.peers import verl_omni as verl_peer

PEERS = os.environ.get("DGF_PEERS")
KINDS = ("double", "real")


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []  # type: ignore[attr-defined]  # a package
    vars(made).update(members)
    return made


def source(project: str, *parts: str) -> Path:
    """A file of a project's checkout, or the test is skipped."""
    if PEERS is None:
        pytest.skip("DGF_PEERS names no folder with checkouts of the projects")
    path = Path(PEERS, project, *parts)
    if not path.exists():
        pytest.skip(f"DGF_PEERS has no {path}")
    return path


def loaded(name: str, path: Path) -> ModuleType:
    """A module by its file, under a name, without the packages above it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def forget(*packages: str) -> None:
    for name in list(sys.modules):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            del sys.modules[name]


@contextmanager
def fresh(*packages: str):
    """Without these packages and our plug-ins' modules, before and after."""
    names = (*packages, "dancegrpo_fast.plugins")
    forget(*names)
    yield
    forget(*names)


# Flow-Factory


class Newest(FlowMatchEulerDiscreteScheduler):
    """Its scheduler as of mid-2026, in few lines: any timesteps, rounding before scoring, float64 means."""

    fields = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "velocity")
    float64_mean = True

    def __init__(self, noise_level=0.7, dynamics_type="Flow-SDE", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.noise_level, self.dynamics_type, self.is_eval = noise_level, dynamics_type, False

    @property
    def current_sde_steps(self):
        return torch.arange(len(self.timesteps) - 1)

    @property
    def num_sde_steps(self):
        return len(self.current_sde_steps)

    def eval(self):
        self.is_eval = True

    def step(
        self,
        velocity,
        timestep,
        latents,
        next_latents=None,
        timestep_next=None,
        generator=None,
        noise_level=None,
        compute_log_prob=True,
        return_dict=True,
        return_kwargs=("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "velocity"),
        dynamics_type=None,
        sigma_max=None,
    ):
        kind, wide = dynamics_type or self.dynamics_type, torch.promote_types(latents.dtype, torch.float32)
        level = 0.0 if self.is_eval else noise_level
        if timestep_next is None:
            steps = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)]
            s, n = self.sigmas[steps], self.sigmas[[i + 1 for i in steps]]
        else:
            s, n = (torch.as_tensor(t, dtype=wide) / 1000 for t in (timestep, timestep_next))
            steps = (
                [int((self.timesteps == t).nonzero()[0]) for t in torch.as_tensor(timestep).reshape(-1)]
                if level is None
                else []
            )
        if level is None:
            level = torch.where(torch.isin(torch.tensor(steps), self.current_sde_steps), self.noise_level, 0.0)
        v, x = velocity.to(wide), latents.to(wide)
        shape = (-1, *(1,) * (x.ndim - 1))
        s, n, level = (torch.as_tensor(t, dtype=wide).expand(len(x)).reshape(shape) for t in (s, n, level))
        dt = n - s
        if kind == "Flow-SDE":
            top = self.sigmas[1] if sigma_max is None else torch.tensor(sigma_max)
            std = torch.sqrt(s / (1 - torch.where(s == 1, top.to(wide), s))) * level
            mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        elif kind == "Dance-SDE":
            std = level
            mean = x + (v + 0.5 * level**2 * (x - (x - s * v) * (1 - s)) / s**2) * dt
        elif kind == "CPS":
            std = n * torch.sin(level * torch.pi / 2)
            mean = (x - s * v) * (1 - n) + (x + v * (1 - s)) * torch.sqrt(n**2 - std**2)
        else:
            std, mean = torch.zeros_like(s), x + v * dt
        tau = std if kind == "CPS" else std * torch.sqrt(-dt)
        if next_latents is None:
            noise = torch_utils.randn_tensor(v.shape, generator=generator, device=v.device, dtype=torch.float32)
            next_latents = (mean + tau * noise.to(wide)).to(latents.dtype)
        next_latents = next_latents.to(wide)
        score = -((next_latents.detach() - mean) ** 2)
        if kind != "CPS":
            score = score / (2 * tau**2) - torch.log(tau) - 0.5 * math.log(2 * math.pi)
        score = score.flatten(1).double() if self.float64_mean else score.flatten(1)
        found = (next_latents, mean, std, dt, score.mean(dim=1).to(wide) if compute_log_prob else None, v)
        named = dict(zip(self.fields, found, strict=True))
        return SimpleNamespace(**{k: named[k] for k in return_kwargs}) if return_dict else tuple(named.values())


class FlowMatchEulerDiscreteSDEScheduler(Newest):
    """The same as of May 2026."""

    fields = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")
    float64_mean = False

    def step(
        self,
        noise_pred,
        timestep,
        latents,
        next_latents=None,
        timestep_next=None,
        generator=None,
        noise_level=None,
        compute_log_prob=True,
        return_dict=True,
        return_kwargs=["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"],  # noqa: B006  # the published signature
        dynamics_type=None,
        sigma_max=None,
    ):
        rest = (next_latents, timestep_next, generator, noise_level, compute_log_prob, return_dict, return_kwargs)
        return Newest.step(self, noise_pred, timestep, latents, *rest, dynamics_type, sigma_max)


class NewestScheduler(Newest):
    """Under the name that Flow-Factory gives it."""


NewestScheduler.__name__ = NewestScheduler.__qualname__ = "FlowMatchEulerDiscreteSDEScheduler"


class UniPCMultistepSDEScheduler(FlowMatchEulerDiscreteSDEScheduler):
    pass


class BaseAccelerator(ABC):  # as Flow-Factory has it
    safety: ClassVar[str]
    stage: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.safety not in ("lossless", "lossy") or cls.stage not in ("rollout", "both"):
            raise TypeError(f"{cls.__name__}: misdeclared")

    def __init__(self, **params: Any) -> None:
        self.params = params

    def setup(self, adapter: Any) -> None:
        return None

    @contextmanager
    def rollout_context(self, adapter: Any):
        yield


class Flux1Adapter:
    """What the plug-in reads of an adapter; `make` builds its transformers."""

    make: ClassVar[Any] = staticmethod(dict)

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.training_args, self.model_args = config.training_args, config.model_args
        self.components = self.make()
        self.target_module_map = {name: ["to_q"] for name in self.components}
        self.scheduler = sys.modules["flow_factory.scheduler"].load("FlowMatchEulerDiscreteScheduler")

    @property
    def transformer_names(self):
        return sorted(self.components)

    def get_component(self, name):
        return self.components[name]

    def _unwrap(self, model):
        return getattr(model, "module", model)


def flow_factory(kind: str) -> None:
    """Puts `flow_factory` into `sys.modules`: "double", "newest", or its own scheduler with "real"."""
    if kind == "real":
        sys.path.insert(0, str(source("Flow-Factory", "src")))
        try:
            importlib.import_module("flow_factory.scheduler")
        finally:
            del sys.path[0]
        return
    registry = {"FlowMatchEulerDiscreteScheduler": "flow_factory.scheduler.FlowMatchEulerDiscreteSDEScheduler"}

    def load(name: str) -> Any:
        home, _, cls = registry[name].rpartition(".")
        return getattr(importlib.import_module(home), cls)()

    made = {
        "flow_factory": {},
        "flow_factory.scheduler": {
            "FlowMatchEulerDiscreteSDEScheduler": NewestScheduler
            if kind == "newest"
            else FlowMatchEulerDiscreteSDEScheduler,
            "UniPCMultistepSDEScheduler": UniPCMultistepSDEScheduler,
            "register_scheduler": registry.__setitem__,
            "load": load,
        },
        "flow_factory.acceleration": {},
        "flow_factory.acceleration.abc": {"BaseAccelerator": BaseAccelerator},
        "flow_factory.models": {},
        "flow_factory.models.registry": {
            "list_registered_models": lambda: {"flux1": "", "sd3-5": ""},
            "get_model_adapter_class": lambda name: Flux1Adapter,
        },
    }
    sys.modules.update({name: module(name, **members) for name, members in made.items()})


# verl-omni


class FlowMatchSDEDiscreteScheduler(verl_peer.FlowMatchSDEDiscreteScheduler):
    pass


@dataclass
class DiffusionLossResult:
    loss: torch.Tensor
    metrics: dict[str, Any]
    add_loss_metric: bool = False


class FlowGRPOLoss:
    required_model_output_keys = ("log_probs",)

    @classmethod
    def compute_loss(cls, *, old_log_prob, log_prob, advantages, config, rollout_is_weights=None):
        c, top = config.diffusion_loss.clip_ratio, config.diffusion_loss.adv_clip_max
        a = advantages.clamp(-top, top)
        rho = torch.exp(log_prob - old_log_prob)
        each = torch.maximum(-a * rho, -a * rho.clamp(1 - c, 1 + c))
        each = each if rollout_is_weights is None else each * rollout_is_weights
        off = rho.detach() - 1
        metrics = {
            "actor/ppo_kl": (old_log_prob - log_prob).mean(),
            "actor/pg_clipfrac": (off.abs() > c).float().mean(),
            "actor/pg_clipfrac_higher": (off > c).float().mean(),
            "actor/pg_clipfrac_lower": (-off > c).float().mean(),
            "actor/ratio_mean": rho.mean(),
            "actor/ratio_std": rho.std(),
        }
        return each.mean(), {name: value.item() for name, value in metrics.items()}

    def __call__(self, *, config, model_output, data):
        loss, metrics = self.compute_loss(
            old_log_prob=data["old_log_probs"],
            log_prob=model_output["log_probs"],
            advantages=data["advantages"],
            config=config,
            rollout_is_weights=data.get("rollout_is_weights"),
        )
        return DiffusionLossResult(loss=loss, metrics=metrics)


class Pipeline:
    __module__ = "verl_omni.pipelines.sd3"


def _model_base() -> ModuleType:
    class VllmOmniPipelineBase:
        @classmethod
        def get_pipeline_path(cls, architecture, algorithm):
            return "verl_omni.pipelines.sd3.Pipeline" if architecture == "SD3" else None

    return module("verl_omni.pipelines.model_base", VllmOmniPipelineBase=VllmOmniPipelineBase)


def _algorithms() -> ModuleType:
    registry: dict[str, Any] = {}

    def register_diffusion_loss(name):
        def decorator(cls):
            registry[name] = cls()
            return cls

        return decorator

    register_diffusion_loss("flow_grpo")(register_diffusion_loss("dance_grpo")(FlowGRPOLoss))
    return module(
        "verl_omni.trainer.diffusion.diffusion_algos",
        DIFFUSION_LOSS_REGISTRY=registry,
        register_diffusion_loss=register_diffusion_loss,
        FlowGRPOLoss=FlowGRPOLoss,
    )


def verl_omni(kind: str) -> None:
    """Puts `verl_omni` into `sys.modules`; its own scheduler and losses where `kind` is "real"."""

    class DiffusersFSDPEngine:
        make = staticmethod(torch.nn.Identity)

        def _build_module(self):
            return self.make()

    names = (
        "verl_omni",
        "verl_omni.pipelines",
        "verl_omni.trainer",
        "verl_omni.trainer.diffusion",
        "verl_omni.workers",
        "verl_omni.workers.engine",
        "verl_omni.workers.engine.fsdp",
    )
    made = [
        *map(module, names),
        _model_base(),
        module("verl_omni.pipelines.sd3", Pipeline=Pipeline),
        module("verl_omni.workers.engine.fsdp.diffusers_impl", DiffusersFSDPEngine=DiffusersFSDPEngine),
    ]
    sys.modules.update({m.__name__: m for m in made})
    if kind == "double":
        schedulers = module("verl_omni.pipelines.schedulers")
        schedulers.FlowMatchSDEDiscreteScheduler = type(  # type: ignore[attr-defined]  # the plug-in changes it
            "FlowMatchSDEDiscreteScheduler",
            (FlowMatchSDEDiscreteScheduler,),
            dict(vars(verl_peer.FlowMatchSDEDiscreteScheduler)),
        )
        sys.modules[schedulers.__name__] = schedulers
        sys.modules["verl_omni.trainer.diffusion.diffusion_algos"] = _algorithms()
        return
    home = source("verl-omni", "verl_omni")
    real = loaded("verl_omni.pipelines.schedulers", home / "pipelines" / "schedulers" / "flow_match_sde.py")
    assert real.FlowMatchSDEDiscreteScheduler
    stubs = {
        "tensordict": {"TensorDict": dict},
        "verl": {"DataProto": object},
        "verl.utils": {"tensordict_utils": None},
        "verl_omni.workers.config": {"DiffusionActorConfig": object},
    }
    sys.modules.update({name: module(name, **members) for name, members in stubs.items()})
    loaded("verl_omni.trainer.diffusion.diffusion_algos", home / "trainer" / "diffusion" / "diffusion_algos.py")


# UniRL


class Strategy:
    """A double of its three: how it samples, scores and rounds."""

    kind = ""

    def __init__(self, *, config=None):
        self.config = config

    def denoise(
        self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, sigma_max=0.99, step_index=0
    ):
        stored, wide = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        v, x = noise_pred.to(wide), sample.to(wide)
        shape = (-1, *(1,) * (x.ndim - 1))
        s, n = (t.float().to(wide).reshape(shape) for t in (sigma, sigma_next))
        dt = n - s
        if self.kind == "cps":
            tau = n * torch.sin(torch.tensor(eta * torch.pi / 2, dtype=torch.float64)).to(wide)
            mean = (x - s * v) * (1 - n) + (x + v * (1 - s)) * torch.sqrt(n**2 - tau**2)
        else:
            top = torch.as_tensor(sigma_max).float().to(wide)
            std = eta * (
                torch.sqrt(s / (1 - torch.where(s == 1, top, s))) if self.kind == "flow" else torch.ones_like(s)
            )
            mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
            tau = std * torch.sqrt(-dt)
        after = mean + tau * torch.randn(v.shape).to(wide) if prev_sample is None else prev_sample.to(wide)
        if eta < 1e-7:
            return after, None, mean
        after = after.to(stored).to(wide)
        score = -((after.detach() - mean) ** 2)
        if self.kind != "cps":
            score = score / (2 * tau**2) - torch.log(tau) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        return after, score.flatten(1).mean(dim=1), mean


def unirl(kind: str) -> None:
    """Puts `unirl.sde.kernels` into `sys.modules`."""
    sys.modules.update({name: module(name) for name in ("unirl", "unirl.sde")})
    if kind == "real":
        loaded("unirl.sde.kernels", source("UniRL", "unirl", "sde", "kernels.py"))
        return
    kinds = {"FlowSDEStrategy": "flow", "DanceSDEStrategy": "dance", "CPSSDEStrategy": "cps"}
    made = {name: type(name, (Strategy,), {"kind": value}) for name, value in kinds.items()}
    sys.modules["unirl.sde.kernels"] = module("unirl.sde.kernels", **made)


ENGINES = SimpleNamespace(flow_factory=flow_factory, verl_omni=verl_omni, unirl=unirl)
