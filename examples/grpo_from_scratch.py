"""GRPO on a tiny FLUX, written with the ops alone: what `dancegrpo-fast train` does, on one page.

    python examples/grpo_from_scratch.py            # about a minute on two cores

Each prompt is a colour, and the reward is how much more of it there is than of the others. Left out of a real run:

1. VAE and text encoders: latents are taken for pixels, and prompts are random vectors.
2. A pretrained base: weights start at random, so that there is no KL to a base and no LoRA on it.
3. Held-out prompts and a second, independent score: here the reward that is trained on is all that is looked at.
4. Micro-batches, several GPUs, checkpoints: one process calls the model with all samples at once.
"""

import argparse

import torch
from diffusers import FluxTransformer2DModel

import dancegrpo_fast as dgf

parser = argparse.ArgumentParser(description="Trains a tiny FLUX with GRPO and prints the reward of each iteration.")
parser.add_argument("--iterations", type=int, default=40)
iterations = parser.parse_args().iterations
P, G, T, SIDE, C, SEED = 3, 8, 8, 4, 3, 0  # prompts, samples of each, steps, pixels a side, channels, of everything
B = P * G

torch.manual_seed(SEED)
model = FluxTransformer2DModel(
    in_channels=C,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=16,
    axes_dims_rope=(4, 6, 6),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(T), eta=0.7)  # the sampler: one row a step
colour = torch.arange(P).repeat_interleave(G)  # samples of a prompt are neighbours
text, pooled = torch.randn(P, 4, 16)[colour], torch.randn(P, 16)[colour]
places = torch.cat([torch.zeros(SIDE**2, 1), torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))], dim=1)


def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
    """The model's output for latents `[B, S, C]` before a step."""
    time = torch.full((B,), float(table.times[step]))
    return model(latents, text, pooled, time, img_ids=places, txt_ids=torch.zeros(4, 3), return_dict=False)[0]


for iteration in range(iterations):
    # Rollout. Noise is drawn in the op, from a seed, the number of the sample in the run, and the step.
    ids = iteration * B + torch.arange(B)
    latents, log_probs = [dgf.gaussian_noise((SIDE**2, C), seed=SEED, sample_ids=ids)], []
    with torch.no_grad():
        for step in range(T):
            out = dgf.transition_step(
                latents[-1], velocity(latents[-1], step), table, step, seed=SEED + 1, sample_ids=ids
            )
            latents.append(out.latents)
            log_probs.append(out.log_prob)

    # Rewards, and what each is worth within its group.
    amount = latents[-1].sigmoid().mean(dim=1)  # [B, C], each from 0 to 1
    wanted = amount.gather(1, colour[:, None])[:, 0]
    rewards = wanted - (amount.sum(dim=1) - wanted) / (C - 1)
    advantages = dgf.group_advantages(rewards, G)

    # Two updates share out the steps. Before the first one the ratio is exactly 1: its metrics say so.
    for number, steps in enumerate(torch.randperm(T - 1).chunk(2)):
        for step in steps.tolist():
            now = velocity(latents[step], step)
            loss = dgf.policy_loss(
                latents[step], now, latents[step + 1], table, step, log_probs[step], advantages, clip_range=1e-2
            )
            (loss.loss / len(steps)).backward()
            if number == 0:
                assert loss.metrics.ratio_max_dev == 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{iteration + 1:>3}/{iterations}  reward {rewards.mean():+.3f}  clipped {loss.metrics.clip_fraction:.0%}")
