"""Pretrain a small HunyuanVideo, text to video or image to video, on moving digits of which half are jittered."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.prompt_store import PromptStore, given_identity
from . import fitting, video
from .fitting import Base

CHANNELS = 8  # of the latents
ROWS = 64  # clips of an encoder's call
VAE_STEPS, VAE_BATCH = 1500, 6
KL = 3e-4  # weight of the divergence, per latent element, beside the squared errors
SHAKE = 1.5  # pixels


def train(base: Base, folder: Path) -> dict[str, nn.Module]:
    """Train the autoencoder and the generator of a base, save them in `folder` and return them.

    Args:
        base: Of family "hunyuan_video", or "skyreels_i2v" for image to video; `wrong` is the share of shaken clips.
        folder: Created.
    """
    from_image = base.family == "skyreels_i2v"
    course = "image" if from_image else "text"
    made = {name: video.make_clips(c, base.wrong, SHAKE, base.seed) for name, c in video.COURSES.items()}
    vae = train_vae(torch.cat([clips for clips, _, _ in made.values()]))
    learned = torch.tensor(video.DIGITS)
    chosen = torch.isin(made[course][1], learned)
    clips, digits, directions = (part[chosen] for part in made[course])
    prompts, embeddings = captions(course, base.seed)
    rows = directions if from_image else len(video.DIRECTIONS) * torch.searchsorted(learned, digits) + directions
    latents, first = fitting.encode(vae, clips, ROWS), None
    if from_image:
        first = F.pad(fitting.encode(vae, clips[:, :, :1], ROWS), (0, 0, 0, 0, 0, latents.shape[2] - 1))
    model = train_transformer(latents, first, rows, embeddings, base)
    pipeline: Any = HunyuanSkyreelsImageToVideoPipeline if from_image else HunyuanVideoPipeline
    parts = {"vae": vae, "transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)}
    pipeline(**parts, **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))).save_pretrained(
        folder
    )
    PromptStore(folder / "prompt_embeds", given_identity(base.family)).add(prompts, embeddings)
    if from_image:
        save_first_frames(folder / "images")
    return {"vae": vae, "generator": model}


def save_first_frames(folder: Path) -> None:
    """Write the images that the prompt files of image to video name, as PNG files."""
    from PIL import Image

    folder.mkdir()
    for name, frame in video.first_frames().items():
        Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / name)


def train_vae(clips: Tensor) -> AutoencoderKLHunyuanVideo:
    """Train an autoencoder, [3, 9, 12, 12] to [8, 3, 6, 6], and set its config so that latents have unit variance.

    Args:
        clips: float32 [B, 3, 9, 12, 12] in [0, 1].
    """
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
        spatial_compression_ratio=2,
        mid_block_add_attention=False,
    )

    # starting from black frames saves the steps that would find them
    nn.init.constant_(vae.decoder.conv_out.conv.bias, -1.0)

    def loss() -> Tensor:
        pixels = clips[torch.randint(len(clips), (VAE_BATCH,))] * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        off = vae.decode(posterior.sample()).sample - pixels
        # ink counts more than paper, and change over time beside the frames: otherwise motion is smoothed away
        error = (off.square() * (pixels + 2)).mean() + off.diff(dim=2).square().mean()
        penalty: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        total: Tensor = error + KL * penalty
        return total

    fitting.fit("vae", vae.parameters(), loss, VAE_STEPS, 5e-3)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / fitting.encode(vae, clips[:: len(clips) // 256], ROWS).std().item())
    return vae


def captions(course: str, seed: int) -> tuple[list[str], dict[str, Tensor]]:
    """Return prompts with fixed random embeddings: a token for the digit, if it is named, and one for the direction.

    Args:
        course: "text": a prompt for each digit and direction, the directions of a digit beside each other. "image": one
            for each direction.
        seed: Seed of the tokens.

    Returns:
        P prompts, and for them `prompt_embeds` [P, L, 32], `prompt_mask` int64 [P, L] of ones and
        `pooled_prompt_embeds` [P, 32].
    """
    generator = torch.Generator().manual_seed(seed)
    digits, directions = (torch.randn(count, 2, fitting.WIDTH, generator=generator) for count in (10, 4))
    digits = digits[list(video.DIGITS)]
    names = list(video.DIRECTIONS)
    if course == "image":
        prompts, parts = [video.image_prompt(name) for name in names], [directions]
    else:
        prompts = [video.video_prompt(digit, name) for digit in video.DIGITS for name in names]
        parts = [digits.repeat_interleave(len(names), dim=0), directions.repeat(len(digits), 1, 1)]
    embeds, pooled = torch.stack([part[:, 0] for part in parts], dim=1), torch.stack([part[:, 1] for part in parts])
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    return prompts, {
        "prompt_embeds": embeds,
        "prompt_mask": mask,
        "pooled_prompt_embeds": pooled.sum(dim=0) / len(parts) ** 0.5,
    }


def train_transformer(
    latents: Tensor, first: Tensor | None, prompts: Tensor, embeddings: dict[str, Tensor], base: Base
) -> HunyuanVideoTransformer3DModel:
    """Train a HunyuanVideo transformer as a rectified flow.

    Args:
        latents: float32 [B, 8, T, H, W], normalised.
        first: Image to video: the first frame's latents on as many more channels and zeros after it, [B, 8, T, H, W].
        prompts: int64 [B], rows of `embeddings`.
        embeddings: As `captions` gives them.
        base: Steps, batch and learning rate.
    """
    channels = latents.shape[1]
    model = HunyuanVideoTransformer3DModel(
        in_channels=channels if first is None else 2 * channels,
        out_channels=channels,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=fitting.WIDTH,
        pooled_projection_dim=fitting.WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    fitting.start_as_identity(model)

    def call(noisy: Tensor, sigma: Tensor, rows: Tensor) -> Any:
        return model(
            hidden_states=noisy if first is None else torch.cat([noisy, first[rows]], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=embeddings["prompt_embeds"][prompts[rows]],
            encoder_attention_mask=embeddings["prompt_mask"][prompts[rows]],
            pooled_projections=embeddings["pooled_prompt_embeds"][prompts[rows]],
            return_dict=False,
        )[0]

    fitting.fit_flow(model, latents, base, call)
    return model.eval()
