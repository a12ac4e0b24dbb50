"""Build small pretrained generators as ordinary diffusers folders, with part of their captions wrong."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.prompt_store import PromptStore, given_identity
from . import data, video
from .rewards.digits import DigitNet

WIDTH = 32  # channels of a prompt token


@dataclass(frozen=True)
class Recipe:
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


RECIPES = {
    "digits": Recipe("flux", "digits", wrong=0.5, steps=1200, batch=64, rate=4e-3),
    "digits_ddim": Recipe("unet", "digits", wrong=0.5, steps=1200, batch=64, rate=2e-3),
    "signs": Recipe("flux", "signs", wrong=0.35, steps=1200, batch=64, rate=4e-3),
    "video": Recipe("hunyuan_video", "clips", wrong=0.5, steps=2500, batch=48, rate=4e-3),
    "video_i2v": Recipe("skyreels_i2v", "clips", wrong=0.5, steps=2000, batch=48, rate=4e-3),
}


@dataclass(frozen=True)
class Captions:
    """Prompts with their fixed random embeddings, row for row.

    Attributes:
        prompts: P prompts.
        embeds: float32 [P, L, 32].
        pooled: float32 [P, 32].
    """

    prompts: list[str]
    embeds: Tensor
    pooled: Tensor


def digit_captions(seed: int, tokens: int = 4) -> Captions:
    """Return ten digit prompts and, as the last row, the empty prompt of classifier-free guidance."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [data.digit_prompt(digit) for digit in range(10)] + [""]
    embeds = torch.randn(len(prompts), tokens, WIDTH, generator=generator)
    return Captions(prompts, embeds, torch.randn(len(prompts), WIDTH, generator=generator))


def sign_captions(seed: int) -> Captions:
    """Return a hundred sign prompts; one token per place and digit, so that unseen numbers have seen tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 10, WIDTH, generator=generator)
    pooled = torch.randn(2, 10, WIDTH, generator=generator)
    tens, units = torch.arange(100) // 10, torch.arange(100) % 10
    embeds = torch.stack([tokens[0, tens], tokens[1, units]], dim=1)
    prompts = [data.sign_prompt(number) for number in range(100)]
    return Captions(prompts, embeds, (pooled[0, tens] + pooled[1, units]) / 2**0.5)


def build(name: str, target: Path, force: bool = False) -> bool:
    """Train the base `name` and write it to `target`.

    The folder is written beside `target` and renamed at the end, so that a folder that exists is whole.

    Args:
        name: A key of `RECIPES`.
        target: Folder to create.
        force: Build again and replace a base that is there.

    Returns:
        False if a complete base was there already and nothing was done.

    Raises:
        ValueError: `name` is unknown, or `target` holds something other than a complete base.
    """
    if name not in RECIPES:
        raise ValueError(f"name: got {name!r}, want one of {sorted(RECIPES)}")
    recipe = RECIPES[name]
    present = (target / "model_index.json").is_file()
    if target.exists() and not present and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target: {target} holds something else, want a new or empty folder or an earlier base")
    missing = [file for file in base_files(recipe) if not (target / file).is_file()]
    if present and not force:
        if missing:
            raise ValueError(f"target: {target} lacks {', '.join(missing)}; build it again with --force")
        print(f"{target} is there and complete; nothing to do (--force builds it again)", flush=True)
        return False
    diffusers_logging.set_verbosity_error()
    began = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        counts = _train(recipe, partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    parts = ", ".join(f"{part} {count / 1e6:.3f} M" for part, count in counts.items())
    print(f"{target}: {size / 1e6:.2f} MB, {time.perf_counter() - began:.0f} s; parameters: {parts}", flush=True)
    return True


def base_files(recipe: Recipe) -> list[str]:
    """Return the files, relative to the folder, that a complete base of this recipe has."""
    network = "unet" if recipe.family == "unet" else "transformer"
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", network)]
    configs = [
        "vae/config.json",
        f"{network}/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ]
    prompts = ["prompt_embeds/identity.json"]
    reward = ["reward/digit_cnn.safetensors"] * (recipe.content != "signs")
    images = [f"images/{row}" for row in video.image_names()] * (recipe.family == "skyreels_i2v")
    return weights + configs + prompts + reward + images


def _train(recipe: Recipe, folder: Path) -> dict[str, int]:
    """Train all parts, save them in `folder` and return their parameter counts."""
    if recipe.content == "clips":
        from . import video_bases

        return video_bases.train(recipe, folder)
    images, labels = data.load_digits("generator")
    labels = data.shuffle_labels(labels, recipe.wrong, recipe.seed)
    if recipe.content == "digits":
        captions = digit_captions(recipe.seed)
    else:
        captions = sign_captions(recipe.seed)
        images, labels = data.make_signs(images, labels, data.sign_numbers()[0], 6000, recipe.seed)
    vae = train_vae(images, centre=recipe.family == "flux", batch=32 if recipe.content == "digits" else 16)
    latents = encode(vae, images)
    network: nn.Module
    pipeline: Any
    if recipe.family == "flux":
        network = train_flux(latents, labels, captions, recipe)
        parts = {"vae": vae, "transformer": network, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)}
        absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipeline = FluxPipeline(**parts, **dict.fromkeys(absent))
    else:
        network = train_unet(latents, labels, captions, recipe)
        parts = {"vae": vae, "unet": network, "scheduler": sd_scheduler()}
        absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        pipeline = StableDiffusionPipeline(**parts, **dict.fromkeys(absent), requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    tensors = {"prompt_embeds": captions.embeds.contiguous()}
    if recipe.family == "flux":
        tensors["pooled_prompt_embeds"] = captions.pooled.contiguous()
    family = "flux" if recipe.family == "flux" else "stable_diffusion"
    PromptStore(folder / "prompt_embeds", given_identity(family)).add(captions.prompts, tensors)
    trained: dict[str, nn.Module] = {"vae": vae, "generator": network}
    if recipe.content == "digits":
        trained["reward"] = train_digit_net()
        (folder / "reward").mkdir()
        save_file(trained["reward"].state_dict(), folder / "reward" / "digit_cnn.safetensors")
    return {part: sum(p.numel() for p in module.parameters()) for part, module in trained.items()}


def train_vae(images: Tensor, centre: bool, steps: int = 280, batch: int = 32, kl: float = 1e-3) -> AutoencoderKL:
    """Train an autoencoder, [3, H, W] to [4, H/2, W/2], and set its config so that latents have unit variance.

    Args:
        images: float32 [N, 3, H, W] in [0, 1].
        centre: Set `shift_factor` as well, which FLUX uses and Stable Diffusion does not.
        steps: Optimiser steps.
        batch: Images a step.
        kl: Weight of the divergence, per latent element, beside the mean squared pixel error.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=images.shape[-2],
        scaling_factor=1.0,
        shift_factor=None,
    )

    def loss() -> Tensor:
        pixels = images[torch.randint(len(images), (batch,))] * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, pixels)
        penalty: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return error + kl * penalty

    _fit("vae", vae.parameters(), loss, steps, 3e-3)
    vae.eval().requires_grad_(False)
    latents = encode(vae, images)
    shift = latents.mean().item() if centre else None
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=shift)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return normalised latents, [N, 3, H, W] in [0, 1] to [N, 4, H/2, W/2] with unit variance."""
    config: Any = vae.config
    means = [vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(256)]
    latents: Tensor = (torch.cat(means) - (config.shift_factor or 0.0)) * config.scaling_factor
    return latents


def train_flux(latents: Tensor, labels: Tensor, captions: Captions, recipe: Recipe) -> FluxTransformer2DModel:
    """Train a FLUX transformer as a rectified flow: z_t = (1 - t) x0 + t eps, v = eps - x0.

    Args:
        latents: float32 [N, 4, H, W], normalised.
        labels: int64 [N], rows of `captions`.
        captions: Prompt embeddings.
        recipe: Steps, batch and learning rate.
    """
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    start_as_identity(model)
    _, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, len(latents), channels, height, width)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    text_ids = torch.zeros(captions.embeds.shape[1], 3)

    def loss() -> Tensor:
        rows = torch.randint(len(packed), (recipe.batch,))
        noise = torch.randn(recipe.batch, *packed.shape[1:])
        sigma = torch.rand(recipe.batch)
        clean, level = packed[rows], sigma[:, None, None]
        predicted = model(
            hidden_states=(1 - level) * clean + level * noise,
            timestep=sigma,
            encoder_hidden_states=captions.embeds[labels[rows]],
            pooled_projections=captions.pooled[labels[rows]],
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, noise - clean)

    _fit("transformer", model.parameters(), loss, recipe.steps, recipe.rate)
    return model.eval()


def start_as_identity(model: nn.Module) -> None:
    """Set the modulation of every block and the last layer of a transformer to zero, in place: it trains faster."""
    for part, module in model.named_modules():
        if part == "proj_out" or part.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def sd_scheduler() -> DDIMScheduler:
    """Return a DDIM scheduler with the alphas and timesteps of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def train_unet(latents: Tensor, labels: Tensor, captions: Captions, recipe: Recipe) -> UNet2DConditionModel:
    """Train a Stable Diffusion UNet to predict the noise; a tenth of the captions is dropped for guidance.

    Args:
        latents: float32 [N, 4, H, W], normalised.
        labels: int64 [N], rows of `captions`; the last row of `captions` is the empty prompt.
        captions: Prompt embeddings.
        recipe: Steps, batch and learning rate.
    """
    model = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = sd_scheduler()

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (recipe.batch,))
        noise = torch.randn(recipe.batch, *latents.shape[1:])
        steps = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch,))
        prompts = torch.where(torch.rand(recipe.batch) < 0.1, len(captions.prompts) - 1, labels[rows])
        noisy = scheduler.add_noise(latents[rows], noise, steps)
        return F.mse_loss(model(noisy, steps, captions.embeds[prompts], return_dict=False)[0], noise)

    _fit("unet", model.parameters(), loss, recipe.steps, recipe.rate)
    return model.eval()


def train_digit_net(steps: int = 700, batch: int = 64) -> DigitNet:
    """Train the reward CNN on the reward split, with shifts, turns, blur and noise as generated images have them."""
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

    _fit("reward", net.parameters(), loss, steps, 3e-3)
    return net.eval()


def _fit(name: str, parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
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
