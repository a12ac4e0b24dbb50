"""A double of Flow-Factory, written from its interface."""

import importlib
import sys
from abc import ABC
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ..compat.peers import flow_factory as peer
from .sources import module, source


class Started:
    """What else the plug-in and its tests read of a scheduler."""

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


class FlowMatchEulerDiscreteSDEScheduler(Started, peer.Of2026March21):
    """As of May 2026."""


class NewestScheduler(Started, peer.FlowMatchEulerDiscreteSDEScheduler):
    """As of mid-2026, under the name that Flow-Factory gives it."""


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
