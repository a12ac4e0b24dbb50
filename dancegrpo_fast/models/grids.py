"""How latents lie: their grids by the size in pixels, packing, and frames from what a VAE decodes."""

from torch import Tensor

from ..recipe import SamplerSettings


def packed(latents: Tensor) -> Tensor:
    """Tokens `[B, h w, 4 C]` from latents `[B, C, 2 h, 2 w]`, two by two."""
    batch, channels, height, width = latents.shape
    parts = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(batch, height * width // 4, 4 * channels)


def unpacked(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, C / 4, 2 h, 2 w]` from latents `[B, h w, C]` that were packed two by two on a grid of `(h, w)`."""
    rows, columns = grid
    batch, _, channels = latents.shape
    parts = latents.reshape(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(batch, channels // 4, 2 * rows, 2 * columns)


def to_frames(pixels: Tensor) -> Tensor:
    """VAE output in [-1, 1] to frames in [0, 1], rounded to 8 bits as files are.

    Args:
        pixels: images `[B, 3, H, W]` or videos `[B, 3, T, H, W]`.

    Returns:
        float32 `[B, T, 3, H, W]`.
    """
    videos = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels
    return ((videos.float() / 2 + 0.5).clamp(0, 1) * 255).round().div(255).transpose(1, 2)


def image_grid(sampler: SamplerSettings, multiple: int, scale: int) -> tuple[int, int]:
    """Latent height and width of an image.

    Args:
        sampler: its size in pixels.
        multiple: that height and width must be of.
        scale: pixels a latent.

    Raises:
        ValueError: another size, or more than one frame.
    """
    if sampler.height % multiple or sampler.width % multiple:
        raise ValueError(f"sampler: got height {sampler.height}, width {sampler.width}, want multiples of {multiple}")
    if sampler.frames != 1:
        raise ValueError(f"sampler.frames: got {sampler.frames}, want 1 for an image model")
    return sampler.height // scale, sampler.width // scale


def video_grid(sampler: SamplerSettings, multiple: int, scale: int, time_scale: int) -> tuple[int, int, int]:
    """Latent frames, height and width of a video; one frame is an image.

    Args:
        sampler: its size in pixels.
        multiple: that height and width must be of.
        scale: pixels a latent.
        time_scale: frames a latent frame, after the first.

    Raises:
        ValueError: another size, or frames other than `time_scale n + 1`.
    """
    if (sampler.frames - 1) % time_scale:
        raise ValueError(
            f"sampler.frames: got {sampler.frames}, want {time_scale} n + 1, the nearest are "
            f"{(sampler.frames - 1) // time_scale * time_scale + 1} and "
            f"{((sampler.frames - 1) // time_scale + 1) * time_scale + 1}"
        )
    if sampler.height % multiple or sampler.width % multiple:
        raise ValueError(f"sampler: got height {sampler.height}, width {sampler.width}, want multiples of {multiple}")
    return (sampler.frames - 1) // time_scale + 1, sampler.height // scale, sampler.width // scale
