"""DDPO's arithmetic, written from MATH.md: coefficients with dimensions, so float32 throughout."""

import math

import torch
from diffusers.utils import torch_utils


def ddim_step_with_logprob(
    self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None, prev_sample=None
):
    shape = (-1, *(1,) * (sample.ndim - 1))
    landing = (timestep - self.config.num_train_timesteps // self.num_inference_steps).clamp(min=0)
    here = self.alphas_cumprod[timestep].reshape(shape)
    after = self.alphas_cumprod[landing].reshape(shape)
    tau = eta * ((1 - after) / (1 - here) * (1 - here / after)) ** 0.5
    clean = (sample - (1 - here) ** 0.5 * model_output) / here**0.5
    mean = after**0.5 * clean + (1 - after - tau**2) ** 0.5 * model_output
    if prev_sample is None:
        noise = torch_utils.randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
        )
        prev_sample = mean + tau * noise
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * tau**2) - torch.log(tau) - 0.5 * math.log(2 * math.pi)
    return prev_sample.to(sample.dtype), log_prob.flatten(1).mean(dim=1)
