"""Small doubles of the engines, written from their interfaces."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..compat.peers import verl_omni as verl_peer
from .factory import BaseAccelerator as BaseAccelerator
from .factory import FlowMatchEulerDiscreteSDEScheduler as FlowMatchEulerDiscreteSDEScheduler
from .factory import Flux1Adapter as Flux1Adapter
from .factory import flow_factory as flow_factory
from .sources import KINDS as KINDS
from .sources import forget as forget
from .sources import fresh as fresh
from .sources import loaded, module, source

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
