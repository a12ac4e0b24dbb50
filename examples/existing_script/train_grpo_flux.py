"""Shaped as DanceGRPO's script for FLUX, with a step function of its own. It knows nothing of this library."""

import argparse
import math

import torch
from diffusers import FluxTransformer2DModel

GROUP, STEPS, CLIP, ETA = 6, 6, 1e-4, 0.3


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    """One step of the sampler, and the log-probability of where it ends."""
    sigma, dsigma = sigmas[index], sigmas[index + 1] - sigmas[index]
    mean = latents + dsigma * model_output
    clean = latents - sigma * model_output
    deviation = eta * math.sqrt(-dsigma)
    if sde_solver:
        score = -(latents - clean * (1 - sigma)) / sigma**2
        mean = mean - 0.5 * eta**2 * score * dsigma
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * deviation
    squares = (prev_sample.detach().float() - mean.float()) ** 2
    log_prob = -squares / (2 * deviation**2) - math.log(deviation) - math.log(math.sqrt(2 * math.pi))
    return prev_sample, clean, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def main(iterations):
    """Trains; prints the reward, and how far the ratio is from 1 before anything has changed."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    prompt = torch.randn(1, 4, 16).repeat(GROUP, 1, 1).bfloat16()
    pooled = torch.randn(1, 16).repeat(GROUP, 1).bfloat16()
    img_ids = torch.cat([torch.zeros(16, 1), torch.cartesian_prod(torch.arange(4), torch.arange(4))], dim=1)
    txt_ids = torch.zeros(4, 3)

    def velocity(latents, index):
        time = sigmas[index].repeat(GROUP)
        return model(latents, prompt, pooled, time, img_ids=img_ids, txt_ids=txt_ids, return_dict=False)[0]

    for iteration in range(iterations):
        latents, scores = [torch.randn(1, 16, 8).repeat(GROUP, 1, 1).bfloat16()], []
        with torch.no_grad():
            for index in range(STEPS):
                output = velocity(latents[-1], index)
                after, _, score = flux_step(output, latents[-1].float(), ETA, sigmas, index, None, True, True)
                latents.append(after.bfloat16())
                scores.append(score)
        rewards = latents[-1].float().mean(dim=(1, 2))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        off = 0.0
        for index in range(STEPS - 1):
            here, after = latents[index].float(), latents[index + 1].float()
            score = flux_step(velocity(latents[index], index), here, ETA, sigmas, index, after, True, True)[2]
            ratio = torch.exp(score - scores[index])
            off = max(off, (ratio - 1).abs().max().item())
            loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            (loss / (STEPS - 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"iteration {iteration + 1}: reward {rewards.mean():+.3f}, ratio off by {off:.1e} before the update")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=4)
    main(parser.parse_args().iterations)
