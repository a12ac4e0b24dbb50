"""The sizes of tiles that a VAE of diffusers may decode in: the trainer sets them, the planner chooses among them.

diffusers tiles what is larger than the VAE's own tile, which for image models is as large as their pictures. Tiles are
square here and overlap by the VAE's own share.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Of one VAE, in pixels: its own tile's side, and what every side is a multiple of."""

    own: int
    unit: int

    def sizes(self, side: int) -> range:
        """Of tiles for a picture whose longer side has so many pixels, rising: those smaller than it."""
        return range(self.unit, side, self.unit)

    def usual(self, side: int) -> int | None:
        """The VAE's own tile where the picture is larger, else half of it; None where it is too small for tiles."""
        if self.own < side and not self.own % self.unit:
            return self.own
        half = ceil(side / 2 / self.unit) * self.unit
        return half if half < side else None


def _shares(vae: Any) -> list[float]:
    """Of a tile, what the next one overlaps."""
    if hasattr(vae, "tile_sample_stride_height"):
        strides = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
        sides = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        return [1 - stride / side for stride, side in zip(strides, sides, strict=True)]
    names = ("tile_overlap_factor", "tile_overlap_factor_height", "tile_overlap_factor_width")
    return [getattr(vae, name) for name in names if hasattr(vae, name)]


def _scale(vae: Any) -> int:
    """Pixels a latent."""
    known = getattr(vae, "spatial_compression_ratio", None)
    return int(known or 2 ** (len(vae.config.block_out_channels) - 1))


def rule(vae: Any) -> Rule:
    """How this VAE tiles.

    Raises:
        ValueError: a VAE that does not.
    """
    shares = _shares(vae)
    own = getattr(vae, "tile_sample_min_size", None) or getattr(vae, "tile_sample_min_height", None)
    if not shares or own is None or not hasattr(vae, "use_tiling"):
        raise ValueError(f"vae_tiling: got tiles for {type(vae).__name__}, want a VAE that tiles, or off")
    # Overlaps are whole latents then: other sides would give pictures of another size.
    parts = [Fraction(share).limit_denominator(16).denominator for share in shares]
    common = max(parts) if len(set(parts)) == 1 else parts[0] * parts[1]
    return Rule(int(own), _scale(vae) * common)


def set_tile(vae: Any, size: int | None) -> None:
    """Decodes pictures larger than `size` pixels in tiles of it, one sample at a time; None: whole, and all at once.

    Raises:
        ValueError: a VAE that does not tile, or a size that it cannot have.
    """
    if size is None:
        vae.disable_tiling()
        vae.disable_slicing()
        return
    found = rule(vae)
    if size < 1 or size % found.unit:
        raise ValueError(f"vae_tile: got {size}, want a multiple of {found.unit} for {type(vae).__name__}")
    latents = size // _scale(vae)
    values: dict[str, int] = {}
    for side, share in zip(("height", "width"), _shares(vae) * 2, strict=False):
        values |= {f"tile_sample_min_{side}": size, f"tile_latent_min_{side}": latents}
        values[f"tile_sample_stride_{side}"] = size - round(size * share)
    values |= {"tile_sample_min_size": size, "tile_latent_min_size": latents}
    for name, value in values.items():
        if hasattr(vae, name):
            setattr(vae, name, value)
    vae.enable_slicing()
    # Without arguments it changes no size.
    vae.enable_tiling()


def tile_of(vae: Any) -> int | None:
    """The side that is set, or None where it decodes whole."""
    if not getattr(vae, "use_tiling", False):
        return None
    return rule(vae).own
