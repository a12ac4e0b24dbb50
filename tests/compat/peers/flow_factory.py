"""Flow-Factory's schedulers, written from MATH.md; what changed in the project is said by the class."""

import math
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils import torch_utils

FIELDS = ["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "velocity"]
OLD_FIELDS = [*FIELDS[:-1], "noise_pred"]


class FlowMatchEulerDiscreteSDEScheduler(FlowMatchEulerDiscreteScheduler):
    is_eval = False
    noise_level = 0.7
    dynamics_type = "Flow-SDE"
    current_sde_steps = torch.tensor([0, 1, 2])

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
        return_kwargs=FIELDS,
        dynamics_type=None,
        sigma_max=None,
    ):
        values = _step(self, velocity, timestep, latents, next_latents, timestep_next, generator, noise_level,
                       compute_log_prob, dynamics_type, sigma_max, rounded=True, bare=True, precise=True)  # fmt: skip
        return SimpleNamespace(**{k: values[k] for k in return_kwargs}) if return_dict else tuple(values.values())


def _older(name, rounded, bare, last_first=False):
    """A scheduler class of an earlier state."""

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
        return_kwargs=OLD_FIELDS,
        dynamics_type=None,
        sigma_max=None,
    ):
        if self.is_eval and last_first:
            moved = UniPCMultistepScheduler.step(self, noise_pred, timestep, latents, return_dict=False)[0]
            return SimpleNamespace(next_latents=moved)
        values = _step(self, noise_pred, timestep, latents, next_latents, timestep_next, generator, noise_level,
                       compute_log_prob, dynamics_type, sigma_max, rounded=rounded, bare=bare)  # fmt: skip
        values["noise_pred"] = values.pop("velocity")
        if return_dict:
            return SimpleNamespace(**{k: values[k] for k in return_kwargs})
        order = ["next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt"]
        if last_first:
            order = ["next_latents", "log_prob", "next_latents_mean", "std_dev_t", "dt"]
        return tuple(values[k] for k in order)

    base = UniPCMultistepScheduler if last_first else FlowMatchEulerDiscreteScheduler
    members = {"step": step, "is_eval": False, "noise_level": 0.7, "dynamics_type": "Flow-SDE"}
    members |= {"current_sde_steps": torch.tensor([0, 1, 2]), "get_train_timesteps": lambda self: self.timesteps[:3]}
    return type(name, (base,), members)


Of2026March21 = _older("FlowMatchEulerDiscreteSDEScheduler", True, True)
Of2026March14 = _older("FlowMatchEulerDiscreteSDEScheduler", True, False)
Of2026January = _older("FlowMatchEulerDiscreteSDEScheduler", False, False)
UniPCMultistepSDEScheduler = _older("UniPCMultistepSDEScheduler", True, True, last_first=True)


def _step(
    self, velocity, timestep, latents, next_latents, timestep_next, generator, noise_level, compute_log_prob,
    dynamics_type, sigma_max, *, rounded, bare, precise=False,
):  # fmt: skip
    kind = dynamics_type or self.dynamics_type
    wide = torch.promote_types(latents.dtype, torch.float32)
    v, x = velocity.to(wide), latents.to(wide)
    shape = (-1, *(1,) * (x.ndim - 1))
    if timestep_next is None:
        steps = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)]
        s, n = self.sigmas[steps], self.sigmas[[i + 1 for i in steps]]
    else:
        s, n = timestep / 1000, timestep_next / 1000
    if noise_level is None:
        inside = self.sigmas if timestep_next is None else self.timesteps / 1000
        level = torch.where(torch.isin(s, inside[self.current_sde_steps]), self.noise_level, 0.0)
    else:
        level = torch.as_tensor(noise_level).reshape(-1)
    if self.is_eval:
        level = torch.zeros(1)
    s, n, level = (t.to(wide).expand(len(x)).reshape(shape) for t in (s, n, level))
    dt = n - s
    root = torch.sqrt(-dt)
    if kind == "ODE":
        mean, std = x + v * dt, torch.zeros_like(s)
        tau = std
    elif kind == "Flow-SDE":
        top = self.sigmas[1] if sigma_max is None else torch.tensor(sigma_max, dtype=wide)
        std = torch.sqrt(s / (1 - torch.where(s == 1, top, s))) * level
        mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        tau = std * root
    elif kind == "Dance-SDE":
        tau = level * root
        std = level if bare else tau
        mean = x + (v + 0.5 * level**2 * (x - (x - s * v) * (1 - s)) / s**2) * dt
    else:
        std = tau = n * torch.sin(level * math.pi / 2)
        mean = (x - s * v) * (1 - n) + (x + v * (1 - s)) * torch.sqrt(n**2 - std**2)
    if next_latents is not None:
        next_latents = next_latents.to(wide)
    elif kind == "ODE":
        next_latents = mean
    else:
        noise = torch_utils.randn_tensor(v.shape, generator=generator, device=v.device, dtype=wide)
        next_latents = mean + tau * noise
        if rounded:
            next_latents = next_latents.to(latents.dtype).to(wide)
    log_prob = -((next_latents.detach() - mean) ** 2)
    if kind == "ODE":
        log_prob = torch.zeros_like(log_prob)
    elif kind != "CPS":
        log_prob = log_prob / (2 * tau**2) - torch.log(tau) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    log_prob = log_prob.flatten(1)
    log_prob = log_prob.double().mean(dim=1).to(wide) if precise else log_prob.mean(dim=1)
    return {
        "next_latents": next_latents,
        "next_latents_mean": mean,
        "velocity": v,
        "log_prob": log_prob if compute_log_prob else None,
        "std_dev_t": std,
        "dt": dt,
    }
