"""Shaped as DanceGRPO's script for Stable Diffusion: a UNet under bfloat16 autocast, DDIM, an update per rollout."""

import functools
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from learning import update
from peers.ddpo import ddim_step_with_logprob

STEPS, GROUP, EPOCHS = 5, 4, 2


def train() -> list[dict[str, Any]]:
    """What was seen of each update."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    unet = UNet2DConditionModel.from_config(settings)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    prompts = torch.randn(GROUP, 3, 8)
    times = [step.repeat(GROUP) for step in scheduler.timesteps[:-1]]
    updates: list[dict[str, Any]] = []
    for _ in range(EPOCHS):
        x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16).repeat(GROUP, 1, 1, 1)
        latents, scores = [x], []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for t in times:
                x, score = ddim_step_with_logprob(scheduler, unet(x, t, prompts).sample, t, x, eta=1.0)
                latents.append(x)
                scores.append(score)

        def score_of(i, latents=latents):
            with torch.autocast("cpu", torch.bfloat16):
                noise, after = unet(latents[i], times[i], prompts).sample, latents[i + 1]
                return ddim_step_with_logprob(scheduler, noise, times[i], latents[i], eta=1.0, prev_sample=after)[1]

        clip_norm = functools.partial(torch.nn.utils.clip_grad_norm_, list(unet.parameters()))
        updates.append(update(x, range(len(times)), score_of, scores, optimizer, clip_norm))
    return updates
