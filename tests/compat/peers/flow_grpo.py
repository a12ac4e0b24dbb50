"""Flow-GRPO's arithmetic, written from MATH.md: everything is float32 first."""

import math

import torch
from diffusers.utils import torch_utils


def sde_step_with_logprob(
    self,
    model_output,
    timestep,
    sample,
    noise_level=0.7,
    prev_sample=None,
    generator=None,
    sde_type="sde",
    return_sqrt_dt=False,
):
    wide = torch.promote_types(sample.dtype, torch.float32)
    v, x = model_output.to(wide), sample.to(wide)
    steps = [self.index_for_timestep(t) for t in timestep]
    shape = (-1, *(1,) * (x.ndim - 1))
    s, n = self.sigmas[steps].view(shape), self.sigmas[[i + 1 for i in steps]].view(shape)
    dt = n - s
    if sde_type == "sde":
        std = torch.sqrt(s / (1 - torch.where(s == 1, self.sigmas[1], s))) * noise_level
        mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        tau = std * torch.sqrt(-dt)
    else:
        std = tau = n * math.sin(noise_level * math.pi / 2)
        mean = (x - s * v) * (1 - n) + (x + v * (1 - s)) * torch.sqrt(n**2 - std**2)
    if prev_sample is None:
        prev_sample = mean + tau * torch_utils.randn_tensor(v.shape, generator=generator, device=v.device, dtype=wide)
    log_prob = -((prev_sample.to(wide).detach() - mean) ** 2)
    if sde_type == "sde":
        log_prob = log_prob / (2 * tau**2) - torch.log(tau) - 0.5 * math.log(2 * math.pi)
    result = (prev_sample, log_prob.flatten(1).mean(dim=1), mean, std)
    return (*result, torch.sqrt(-dt)) if return_sqrt_dt else result


def sde_step_of_flow_cps(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None):
    return sde_step_with_logprob(self, model_output, timestep, sample, noise_level, prev_sample, generator, "cps")


def ode_step_with_logprob(
    self,
    model_output,
    mean_model_output,
    timestep,
    sample,
    noise_level=0.7,
    prev_sample=None,
    generator=None,
    sde_type="sde",
    return_sqrt_dt=False,
):
    wide = torch.promote_types(sample.dtype, torch.float32)
    x = sample.to(wide)
    steps = [self.index_for_timestep(t) for t in timestep]
    shape = (-1, *(1,) * (x.ndim - 1))
    s, n = self.sigmas[steps].view(shape), self.sigmas[[i + 1 for i in steps]].view(shape)
    dt = n - s
    std = torch.sqrt(s / (1 - torch.where(s == 1, self.sigmas[1], s))) * noise_level
    prev_sample = x + model_output.to(wide) * dt if prev_sample is None else prev_sample.to(wide)
    mean = x + mean_model_output.to(wide) * dt
    log_prob = -((prev_sample.detach() - mean) ** 2).flatten(1).mean(dim=1)
    result = (prev_sample, log_prob, mean, std)
    return (*result, torch.sqrt(-dt)) if return_sqrt_dt else result


# As it is called in its project.
sde_step_of_flow_cps.__name__ = "sde_step_with_logprob"
