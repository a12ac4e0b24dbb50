"""A double of Flow-Factory, written from its interface."""

import importlib
import math
import sys
from abc import ABC
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import torch_utils

from .sources import module, source


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
