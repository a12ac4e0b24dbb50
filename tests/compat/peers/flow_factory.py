"""Flow-Factory's scheduler, written from MATH.md."""

import math
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import torch_utils


class FlowMatchEulerDiscreteSDEScheduler(FlowMatchEulerDiscreteScheduler):
    is_eval = False
    noise_level = 0.7
    dynamics_type = "Flow-SDE"
    current_sde_steps = torch.tensor([0, 1, 2])

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
        kind = dynamics_type or self.dynamics_type
        steps = [self.index_for_timestep(t) for t in torch.as_tensor(timestep).reshape(-1)]
        wide = torch.promote_types(latents.dtype, torch.float32)
        v, x = noise_pred.to(wide), latents.to(wide)
        shape = (-1, *(1,) * (x.ndim - 1))
        if timestep_next is None:
            s, n = self.sigmas[steps], self.sigmas[[i + 1 for i in steps]]
        else:
            s, n = timestep / 1000, timestep_next / 1000
        inside = torch.isin(torch.tensor(steps), self.current_sde_steps)
        level = torch.where(inside, self.noise_level, 0.0) if noise_level is None else torch.tensor([noise_level])
        if self.is_eval:
            level = torch.zeros(1)
        s, n, level = (t.to(wide).expand(len(x)).reshape(shape) for t in (s, n, level))
        dt = n - s
        if kind == "ODE":
            mean, std = x + v * dt, torch.zeros_like(s)
            tau = std
        elif kind == "Flow-SDE":
            top = self.sigmas[1] if sigma_max is None else torch.tensor(sigma_max, dtype=wide)
            std = torch.sqrt(s / (1 - torch.where(s == 1, top, s))) * level
            mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
            tau = std * torch.sqrt(-dt)
        elif kind == "Dance-SDE":
            std = tau = level * torch.sqrt(-dt)
            mean = x + (v + 0.5 * level**2 * (x - (x - s * v) * (1 - s)) / s**2) * dt
        else:
            std = tau = n * torch.sin(level * math.pi / 2)
            mean = (x - s * v) * (1 - n) + (x + v * (1 - s)) * torch.sqrt(n**2 - std**2)
        if next_latents is None and kind == "ODE":
            next_latents = mean
        elif next_latents is None:
            noise = torch_utils.randn_tensor(v.shape, generator=generator, device=v.device, dtype=wide)
            next_latents = mean + tau * noise
        log_prob = -((next_latents.to(wide).detach() - mean) ** 2)
        if kind == "ODE":
            log_prob = torch.zeros_like(log_prob)
        elif kind != "CPS":
            log_prob = log_prob / (2 * tau**2) - torch.log(tau) - 0.5 * math.log(2 * math.pi)
        values = {
            "next_latents": next_latents,
            "next_latents_mean": mean,
            "noise_pred": v,
            "log_prob": log_prob.flatten(1).mean(dim=1) if compute_log_prob else None,
            "std_dev_t": std,
            "dt": dt,
        }
        return SimpleNamespace(**{k: values[k] for k in return_kwargs}) if return_dict else tuple(values.values())
