"""verl-omni's scheduler, written from MATH.md."""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import torch_utils


class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    def sample_previous_step(
        self,
        sample,
        model_output,
        timestep=None,
        generator=None,
        per_token_timesteps=None,
        noise_level=0.7,
        prev_sample=None,
        sde_type="sde",
        return_logprobs=True,
        return_sqrt_dt=False,
        include_logprob_normalizer=True,
    ):
        x, v = sample, model_output
        if timestep is None:
            s, n = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        else:
            steps = torch.tensor([self.index_for_timestep(t) for t in timestep])
            shape = (-1, *(1,) * (x.ndim - 1))
            s, n = self.sigmas[steps].view(shape), self.sigmas[steps + 1].view(shape)
        dt = n - s
        if sde_type == "sde":
            std = torch.sqrt(s / (1 - torch.where(s == 1, self.sigmas[1], s))) * noise_level
            mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
            tau = std * torch.sqrt(-dt)
        elif sde_type == "cps":
            std = tau = n * torch.sin(torch.as_tensor(noise_level, dtype=torch.float64) * math.pi / 2).to(n.dtype)
            mean = (x - s * v) * (1 - n) + (x + v * (1 - s)) * torch.sqrt(n**2 - std**2)
        else:
            score = -(x - (x - s * v) * (1 - s)) / s**2
            mean = x + dt * v + -0.5 * noise_level**2 * score * dt
            std = tau = noise_level * torch.sqrt(-dt)
        if prev_sample is None:
            noise = torch_utils.randn_tensor(v.shape, generator=generator, device=v.device, dtype=v.dtype)
            prev_sample = mean + tau * noise
        log_prob = -((prev_sample.detach() - mean) ** 2)
        if sde_type != "cps":
            log_prob = log_prob / (2 * tau**2)
            if include_logprob_normalizer:
                log_prob = log_prob - torch.log(tau) - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob.flatten(1).mean(dim=1) if return_logprobs else None
        result = (prev_sample, log_prob, mean, std)
        root = torch.sqrt(-dt)
        return (*result, root.expand(len(x)) if root.ndim == 0 else root.flatten()) if return_sqrt_dt else result
