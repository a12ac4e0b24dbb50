"""The VAE's decode: bytes at its peak and its work, from traces."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..trace.result import Trace
from ..trace.tracer import trace
from . import specs
from .calls import Vector, added
from .cases import resolved

# Latent frames after which a decode frame by frame repeats itself.
STEADY = 4


@dataclass(frozen=True)
class Decode:
    """Of one call: `weights` of the VAE, `peak` by category beside them, what ran, and its work."""

    weights: int
    peak: Vector
    op: str
    module: str
    flops: Vector
    traffic: Vector


class _Tiles:
    """Stands in for a VAE's decoder: runs the last of its largest calls, and makes the others' results only."""

    def __init__(self, decoder: nn.Module, compression: tuple[int, int, int]) -> None:
        self.original, self.compression = decoder.forward, compression
        self.sizes: list[int] = []
        self.real: int | None = None
        self.calls = 0

    def __call__(self, tile: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if self.real is None:
            self.sizes.append(tile.numel())
        elif self.calls - 1 == self.real:
            decoded: Tensor = self.original(tile, *args, **kwargs)
            return decoded
        time, height, width = self.compression
        size = [(tile.shape[2] - 1) * time + 1] if tile.ndim == 5 else []
        return tile.new_empty(tile.shape[0], 3, *size, tile.shape[-2] * height, tile.shape[-1] * width)


def _run(spec: specs.Spec, grid: tuple[int, int, int], rows: int, tiling: bool) -> tuple[Trace, float]:
    """A trace, and how much more work there is than in it."""
    vae: Any = specs.build_vae(spec)
    if tiling:
        if not hasattr(vae, "enable_tiling"):
            raise ValueError(f"vae_tiling: got True for {type(vae).__name__}, want a VAE that tiles")
        vae.enable_tiling()
        for name in ("blend_v", "blend_h", "blend_t"):
            # Row by row and in place: thousands of operators that hold nothing.
            if hasattr(vae, name):
                setattr(vae, name, lambda above, tile, extent: tile)
    by_frame = type(vae).__name__ in ("AutoencoderKLWan", "AutoencoderKLQwenImage")
    shape = (rows, spec.latent_channels, *(grid if spec.is_video or by_frame else grid[1:]))
    given = {"z": torch.empty(shape, device="meta", dtype=torch.bfloat16), "return_dict": False}
    if not tiling or by_frame:
        return trace(vae, given, train=False, call=vae.decode), 1.0
    tiles = _Tiles(vae.decoder, spec.compression)
    vae.decoder.forward = tiles
    # Counts the calls.
    trace(vae, given, train=False, call=vae.decode)
    largest = max(tiles.sizes)
    tiles.real = max(i for i, size in enumerate(tiles.sizes) if size == largest)
    tiles.calls = 0
    return trace(vae, given, train=False, call=vae.decode), sum(tiles.sizes) / largest


def _figures(spec: specs.Spec, grid: tuple[int, int, int], rows: int, tiling: bool) -> Decode:
    found, more = _run(spec, grid, rows, tiling)
    peak = found.peak_of("rollout")
    weights = found.live("load").get("parameters", 0)
    rest = sum(size for key, size in peak.by_category.items() if key != "parameters")
    work = [
        {key: value * more for key, value in Counter(part.get("rollout", {})).items()}
        for part in (found.flops_by_group, found.bytes_by_group)
    ]
    return Decode(weights, {"temporaries": rest}, peak.op, peak.module, *work)


@lru_cache(maxsize=32)
def decode(model: str, frames: int, height: int, width: int, rows: int, tiling: bool) -> Decode:
    """Of `rows` samples at once, in bf16.

    VAEs that decode frame by frame are traced for two short clips and extended, as each further frame does the same.

    Raises:
        ValueError: the VAE is not known, or does not tile.
    """
    spec = resolved(model)
    grid = specs.latent_grid(spec, frames, height, width)
    if spec.vae != "AutoencoderKLWan" or grid[0] <= STEADY + 1:
        return _figures(spec, grid, rows, tiling)
    short, longer = (_figures(spec, (n, *grid[1:]), rows, tiling) for n in (STEADY, STEADY + 1))
    more = grid[0] - STEADY

    def extended(a: Vector, b: Vector) -> Vector:
        return added((1 - more, a), (more, b))

    return Decode(
        short.weights,
        extended(short.peak, longer.peak),
        longer.op,
        longer.module,
        extended(short.flops, longer.flops),
        extended(short.traffic, longer.traffic),
    )
