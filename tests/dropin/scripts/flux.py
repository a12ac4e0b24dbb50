"""Shaped as DanceGRPO's script for FLUX: FSDP1 around each block, checkpoints, bfloat16 autocast, its step in the file.

Its latents are cast to bfloat16 after each step.
"""

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from learning import update
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

STEPS, GROUP, EPOCHS, ETA = 4, 4, 2, 0.3
BLOCKS = {transformer_flux.FluxTransformerBlock, transformer_flux.FluxSingleTransformerBlock}


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    here, after = sigmas[index], sigmas[index + 1]
    clean = latents - here * model_output
    mean = latents + (after - here) * model_output
    deviation = eta * math.sqrt(here - after)
    if sde_solver:
        score = -(latents - clean * (1 - here)) / here**2
        mean = mean + -0.5 * eta**2 * score * (after - here)
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * deviation
    squares = (prev_sample.detach().float() - mean.float()) ** 2
    log_prob = -squares / (2 * deviation**2) - math.log(deviation) - math.log(math.sqrt(2 * math.pi))
    return prev_sample, clean, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def wrapped(model):
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=BLOCKS)
    full = MixedPrecision(torch.float32, torch.float32, torch.float32, cast_forward_inputs=False)
    unit = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        mixed_precision=full,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_id=torch.device("cpu"),
    )
    apply_activation_checkpointing(unit, check_fn=lambda module: type(module) in BLOCKS)
    return unit


def train() -> list[dict[str, Any]]:
    """What was seen of each update."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    torch.manual_seed(0)
    settings = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    model = wrapped(FluxTransformer2DModel.from_config(settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    ids = {
        "img_ids": torch.cat([torch.zeros(16, 1), torch.randint(0, 4, (16, 2))], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }
    prompt = {"encoder_hidden_states": torch.randn(1, 5, 24), "pooled_projections": torch.randn(1, 12)}
    prompt = {name: value.repeat(GROUP, *[1] * (value.ndim - 1)) for name, value in prompt.items()}

    def called(x, i):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, timestep=sigmas[i].repeat(GROUP), **prompt, **ids, return_dict=False)[0]

    updates: list[dict[str, Any]] = []
    for _ in range(EPOCHS):
        x = torch.randn(1, 16, 8, dtype=torch.bfloat16).repeat(GROUP, 1, 1)
        latents, scores = [x], []
        with torch.no_grad():
            for i in range(STEPS - 1):
                x, _, score = flux_step(called(x, i), x.float(), ETA, sigmas, i, None, True, True)
                x = x.to(torch.bfloat16)
                latents.append(x)
                scores.append(score)

        def score_of(i, latents=latents):
            x, after = latents[i].float(), latents[i + 1].float()
            return flux_step(called(latents[i], i), x, ETA, sigmas, i, after, True, True)[2]

        updates.append(update(x, torch.randperm(STEPS - 1), score_of, scores, optimizer, model.clip_grad_norm_))
    dist.destroy_process_group()
    return updates
