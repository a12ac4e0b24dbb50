"""The VAE's decode: bytes at its peak and its work, from traces."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..trace.allocator import reserved_bytes
from ..trace.result import Trace
from ..trace.tracer import trace
from . import specs
from .calls import Vector, added
from .cases import resolved
from .tiles import set_tile

# Latent frames after which a decode frame by frame repeats itself.
STEADY = 4
# Decode one latent frame after another, with what the frames before left.
BY_FRAME = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
# Of these the tiles but one are not computed: their decoders take latents and give pictures.
STOOD_IN = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo", *BY_FRAME)
COLOURS = 3


@dataclass(frozen=True)
class Call:
    """One decode: `rows` samples of so many pixels, whole or in tiles, whose side is `tile` pixels, one by one.

    Attributes:
        model: as `specs.resolve` takes it.
        frames, height, width: of a sample.
        rows: samples together.
        tile: in pixels, or None.
        dtype: of weights and latents: "bfloat16", "float16" or "float32".
        kernel: of attention, as traces name it; "cpu" is traced as a CPU computes.
    """

    model: str
    frames: int
    height: int
    width: int
    rows: int
    tile: int | None = None
    dtype: str = "bfloat16"
    kernel: str = "flash"

    @property
    def pixels(self) -> int:
        """Numbers of all samples' pictures."""
        return COLOURS * self.rows * self.frames * self.height * self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class Decode:
    """Of one call: bytes, what ran at the peak, and its work.

    Attributes:
        weights: of the VAE.
        peak: by category beside the weights; "workspace" is what operators take within themselves.
        reserved: beside the weights, what torch's caching allocator would hold if there is room.
        op, module: that ran at the peak.
        flops, traffic: by group of operators.
    """

    weights: int
    peak: Vector
    reserved: float
    op: str
    module: str
    flops: Vector
    traffic: Vector


class _Tiles:
    """Stands in for a VAE's decoder: runs the last of its largest tiles, and makes the others' results only."""

    def __init__(self, vae: Any, compression: tuple[int, int, int], frames: int) -> None:
        self.original, self.compression = vae.decoder.forward, compression
        patch = getattr(vae.config, "patch_size", None) if type(vae).__name__ in BY_FRAME else None
        self.patch = patch or 1
        # A tile's frames follow each other, each a call.
        self.frames = frames
        self.sizes: list[int] = []
        self.real: int | None = None
        self.calls = 0

    def __call__(self, tile: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        number, frame = divmod(self.calls, self.frames)
        self.calls += 1
        if self.real is None and frame == 0:
            self.sizes.append(tile.numel())
        if number == self.real:
            decoded: Tensor = self.original(tile, *args, **kwargs)
            return decoded
        time, height, width = self.compression
        # Frames but the first are several; alone, a later one is no first.
        size = [tile.shape[2] * time if frame else (tile.shape[2] - 1) * time + 1] if tile.ndim == 5 else []
        sides = (tile.shape[-2] * height // self.patch, tile.shape[-1] * width // self.patch)
        return tile.new_empty(tile.shape[0], COLOURS * self.patch**2, *size, *sides)


def _traced(vae: Any, latents: Tensor, call: Call) -> Trace:
    given = {"z": latents, "return_dict": False}
    return trace(vae, given, train=False, call=vae.decode, attention=call.kernel, workspaces=True)


def _run(spec: specs.Spec, call: Call, grid: tuple[int, int, int]) -> tuple[Trace, float]:
    """A trace, and how much more work there is than in it."""
    vae: Any = specs.build_vae(spec, call.torch_dtype)
    kind = type(vae).__name__
    shape = (call.rows, spec.latent_channels, *(grid if spec.is_video or kind in BY_FRAME else grid[1:]))
    latents = torch.empty(shape, device="meta", dtype=call.torch_dtype)
    if call.tile is None:
        return _traced(vae, latents, call), 1.0
    set_tile(vae, call.tile)
    for name in ("blend_v", "blend_h", "blend_t"):
        # Row by row and in place: thousands of operators that hold nothing.
        if hasattr(vae, name):
            setattr(vae, name, lambda above, tile, extent: tile)
    if kind not in STOOD_IN:
        return _traced(vae, latents, call), 1.0
    tiles = _Tiles(vae, spec.compression, grid[0] if kind in BY_FRAME else 1)
    vae.decoder.forward = tiles
    # Counts the calls.
    _traced(vae, latents, call)
    largest = max(tiles.sizes)
    tiles.real = max(i for i, size in enumerate(tiles.sizes) if size == largest)
    tiles.calls = 0
    return _traced(vae, latents, call), sum(tiles.sizes) / largest


def _figures(spec: specs.Spec, call: Call, grid: tuple[int, int, int]) -> Decode:
    found, more = _run(spec, call, grid)
    peak = found.peak_of("rollout")
    weights = found.live("load").get("parameters", 0)
    within = peak.by_category.get("workspace", 0)
    rest = sum(peak.by_category.values()) - peak.by_category.get("parameters", 0) - within
    work = [
        {key: value * more for key, value in Counter(part.get("rollout", {})).items()}
        for part in (found.flops_by_group, found.bytes_by_group)
    ]
    taken: Vector = {"temporaries": rest, "workspace": within}
    return Decode(weights, taken, reserved_bytes(found) - weights, peak.op, peak.module, *work)


@lru_cache(maxsize=64)
def decode(call: Call) -> Decode:
    """Predicted for a call.

    VAEs that decode frame by frame are traced for two short clips and extended, as each further frame does the same.
    Tiles decode the samples one after another, so that one is traced.

    Raises:
        ValueError: the VAE is not known, does not tile, or has no tiles of that side.
    """
    spec = resolved(call.model)
    if call.tile is not None and call.rows > 1:
        return _one_by_one(call)
    grid = specs.latent_grid(spec, call.frames, call.height, call.width)
    if spec.vae != "AutoencoderKLWan" or grid[0] <= STEADY + 1:
        return _figures(spec, call, grid)
    short, longer = (_figures(spec, call, (n, *grid[1:])) for n in (STEADY, STEADY + 1))
    more = grid[0] - STEADY

    def extended(a: Vector, b: Vector) -> Vector:
        return added((1 - more, a), (more, b))

    return replace(
        longer,
        peak=extended(short.peak, longer.peak),
        reserved=short.reserved + more * (longer.reserved - short.reserved),
        flops=extended(short.flops, longer.flops),
        traffic=extended(short.traffic, longer.traffic),
    )


def _one_by_one(call: Call) -> Decode:
    """Of a sample, beside the pictures that are there when the last one is made; at the end they are joined."""
    each = decode(replace(call, rows=1))
    there = (call.rows - 1) * call.pixels // call.rows * call.torch_dtype.itemsize
    peak = added((1, each.peak), (1, {"temporaries": there}))
    joined = 2 * call.pixels * call.torch_dtype.itemsize
    if sum(peak.values()) < joined:
        each = replace(each, op="aten.cat", module="")
        peak = {"temporaries": float(joined), "workspace": 0.0}
    return replace(
        each,
        peak=peak,
        reserved=max(each.reserved + there, joined),
        flops=added((call.rows, each.flops)),
        traffic=added((call.rows, each.traffic)),
    )
