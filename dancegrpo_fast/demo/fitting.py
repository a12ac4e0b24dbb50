"""What all bases of the demo are trained with, and the reward's network."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data
from .rewards.digits import DigitNet

WIDTH = 32  # channels of a prompt token


@dataclass(frozen=True)
class Base:
    """Settings of one base.

    Attributes:
        family: "flux", "hunyuan_video", "skyreels_i2v" (rectified flows) or "unet" (diffusion, epsilon prediction).
        content: "digits", "signs" or "clips".
        wrong: Share of the digit labels that is shuffled before pretraining, or of the clips that is shaken, in [0, 1].
        steps: Optimiser steps of the generator.
        batch: Images or clips a step.
        rate: Peak learning rate of the generator.
        seed: Seed of everything that is drawn.
    """

    family: str
    content: str
    wrong: float
    steps: int
    batch: int
    rate: float
    seed: int = 0


def fit(name: str, parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """Minimise `loss` with AdamW under a one-cycle schedule; a progress line every few seconds."""
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    began = spoke = time.perf_counter()
    total, count = 0.0, 0
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        total, count = total + float(value.detach()), count + 1
        if time.perf_counter() - spoke > 5 or step == steps:
            spoke = time.perf_counter()
            print(f"{name} {step}/{steps}  loss {total / count:.4f}  {spoke - began:.0f} s", flush=True)
            total, count = 0.0, 0


def fit_flow(model: nn.Module, latents: Tensor, base: Base, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Train a rectified flow: z_t = (1 - t) x0 + t eps, v = eps - x0.

    Args:
        model: What is trained.
        latents: float32 [B, ...], normalised.
        base: Steps, batch and learning rate.
        call: Gives v by z_t, t [B] and the rows of `latents` that z_t was made of, int64 [B].
    """

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (base.batch,))
        noise = torch.randn(base.batch, *latents.shape[1:])
        sigma = torch.rand(base.batch)
        clean, level = latents[rows], sigma.view(-1, *(1,) * (latents.ndim - 1))
        return F.mse_loss(call((1 - level) * clean + level * noise, sigma, rows), noise - clean)

    fit("transformer", model.parameters(), loss, base.steps, base.rate)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, rows: int) -> Tensor:
    """Return normalised latents of unit variance, `rows` samples at a time.

    Args:
        vae: An image or video autoencoder of diffusers.
        pixels: float32 [B, 3, ...] in [0, 1].
        rows: Samples of a call.
    """
    means = [vae.encode(part * 2 - 1).latent_dist.mode() for part in pixels.split(rows)]
    latents: Tensor = (torch.cat(means) - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return latents


def start_as_identity(model: nn.Module) -> None:
    """Set the modulation of every block and the last layer of a transformer to zero, in place: it trains faster."""
    for part, module in model.named_modules():
        if part == "proj_out" or part.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def train_digit_net() -> DigitNet:
    """Train the reward CNN on the reward split, with shifts, turns, blur and noise as generated images have them."""
    batch = 64
    images, labels = data.load_digits("reward")
    net = DigitNet()

    def loss() -> Tensor:
        rows = torch.randint(len(images), (batch,))
        turn = (torch.rand(batch) - 0.5) * 0.4
        scale = 1 + (torch.rand(batch) - 0.5) * 0.3
        shift = (torch.rand(batch, 2, 1) - 0.5) * 0.4
        turned = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(batch, 2, 2)
        grid = F.affine_grid(
            torch.cat([turned * scale[:, None, None], shift], dim=2), [batch, 3, 16, 16], align_corners=False
        )
        clean = F.grid_sample(images[rows], grid, align_corners=False)
        blurred = F.avg_pool2d(clean, 3, stride=1, padding=1)
        pixels = clean.lerp(blurred, torch.rand(batch, 1, 1, 1))
        pixels = pixels + 0.2 * torch.rand(batch, 1, 1, 1) * torch.randn(batch, 1, *pixels.shape[2:])
        return F.cross_entropy(net(pixels.clamp(0, 1)), labels[rows])

    fit("reward", net.parameters(), loss, 700, 3e-3)
    return net.eval()
