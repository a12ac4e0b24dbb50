"""Pretrain a small FLUX or Stable Diffusion on digits or signs, part of whose captions is wrong."""

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
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.prompt_store import PromptStore, given_identity
from . import data, fitting
from .fitting import Base

KL = 1e-3  # of the autoencoder: weight of the divergence, per latent element, beside the mean squared pixel error


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


def digit_captions(seed: int) -> Captions:
    """Return ten digit prompts and, as the last row, the empty prompt of classifier-free guidance."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [data.digit_prompt(digit) for digit in range(10)] + [""]
    embeds = torch.randn(len(prompts), 4, fitting.WIDTH, generator=generator)
    return Captions(prompts, embeds, torch.randn(len(prompts), fitting.WIDTH, generator=generator))


def sign_captions(seed: int) -> Captions:
    """Return a hundred sign prompts; one token per place and digit, so that unseen numbers have seen tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 10, fitting.WIDTH, generator=generator)
    pooled = torch.randn(2, 10, fitting.WIDTH, generator=generator)
    tens, units = torch.arange(100) // 10, torch.arange(100) % 10
    embeds = torch.stack([tokens[0, tens], tokens[1, units]], dim=1)
    prompts = [data.sign_prompt(number) for number in range(100)]
    return Captions(prompts, embeds, (pooled[0, tens] + pooled[1, units]) / 2**0.5)


def train(base: Base, folder: Path) -> dict[str, nn.Module]:
    """Train the autoencoder and the generator, save them in `folder` and return them.

    Args:
        base: Of family "flux" or "unet".
        folder: Created.
    """
    images, labels = data.load_digits("generator")
    labels = data.shuffle_labels(labels, base.wrong, base.seed)
    if base.content == "digits":
        captions = digit_captions(base.seed)
    else:
        captions = sign_captions(base.seed)
        images, labels = data.make_signs(images, labels, data.sign_numbers()[0], 6000, base.seed)
    vae = train_vae(images, centre=base.family == "flux", batch=32 if base.content == "digits" else 16)
    latents = fitting.encode(vae, images, 256)
    network: nn.Module
    pipeline: Any
    if base.family == "flux":
        network = train_flux(latents, labels, captions, base)
        parts = {"vae": vae, "transformer": network, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)}
        absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipeline = FluxPipeline(**parts, **dict.fromkeys(absent))
    else:
        network = train_unet(latents, labels, captions, base)
        parts = {"vae": vae, "unet": network, "scheduler": sd_scheduler()}
        absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        pipeline = StableDiffusionPipeline(**parts, **dict.fromkeys(absent), requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    tensors = {"prompt_embeds": captions.embeds.contiguous()}
    if base.family == "flux":
        tensors["pooled_prompt_embeds"] = captions.pooled.contiguous()
    family = "flux" if base.family == "flux" else "stable_diffusion"
    PromptStore(folder / "prompt_embeds", given_identity(family)).add(captions.prompts, tensors)
    return {"vae": vae, "generator": network}


def train_vae(images: Tensor, centre: bool, batch: int) -> AutoencoderKL:
    """Train an autoencoder, [3, H, W] to [4, H/2, W/2], and set its config so that latents have unit variance.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        centre: Set `shift_factor` as well, which FLUX uses and Stable Diffusion does not.
        batch: Images a step.
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
        return error + KL * penalty

    fitting.fit("vae", vae.parameters(), loss, 280, 3e-3)
    vae.eval().requires_grad_(False)
    latents = fitting.encode(vae, images, 256)
    shift = latents.mean().item() if centre else None
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=shift)
    return vae


def train_flux(latents: Tensor, labels: Tensor, captions: Captions, base: Base) -> FluxTransformer2DModel:
    """Train a FLUX transformer as a rectified flow.

    Args:
        latents: float32 [B, 4, H, W], normalised.
        labels: int64 [B], rows of `captions`.
        captions: Prompt embeddings.
        base: Steps, batch and learning rate.
    """
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=fitting.WIDTH,
        pooled_projection_dim=fitting.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    fitting.start_as_identity(model)
    _, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, len(latents), channels, height, width)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    text_ids = torch.zeros(captions.embeds.shape[1], 3)

    def call(noisy: Tensor, sigma: Tensor, rows: Tensor) -> Any:
        return model(
            hidden_states=noisy,
            timestep=sigma,
            encoder_hidden_states=captions.embeds[labels[rows]],
            pooled_projections=captions.pooled[labels[rows]],
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]

    fitting.fit_flow(model, packed, base, call)
    return model.eval()


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


def train_unet(latents: Tensor, labels: Tensor, captions: Captions, base: Base) -> UNet2DConditionModel:
    """Train a Stable Diffusion UNet to predict the noise; a tenth of the captions is dropped for guidance.

    Args:
        latents: float32 [B, 4, H, W], normalised.
        labels: int64 [B], rows of `captions`; the last row of `captions` is the empty prompt.
        captions: Prompt embeddings.
        base: Steps, batch and learning rate.
    """
    model = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=fitting.WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = sd_scheduler()

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (base.batch,))
        noise = torch.randn(base.batch, *latents.shape[1:])
        steps = torch.randint(scheduler.config.num_train_timesteps, (base.batch,))
        prompts = torch.where(torch.rand(base.batch) < 0.1, len(captions.prompts) - 1, labels[rows])
        noisy = scheduler.add_noise(latents[rows], noise, steps)
        return F.mse_loss(model(noisy, steps, captions.embeds[prompts], return_dict=False)[0], noise)

    fitting.fit("unet", model.parameters(), loss, base.steps, base.rate)
    return model.eval()
