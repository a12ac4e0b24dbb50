"""Decodes as a phase of an iteration: whole or in tiles, as the trainer chooses them."""

import bisect
import math
from typing import TYPE_CHECKING

from . import policy as policies
from . import specs
from .budget import Phase
from .calls import Moment, added
from .decode import Call, Decode, decode
from .margins import with_margins
from .settings import GIB, Settings
from .tiles import rule

if TYPE_CHECKING:
    from .iteration import Iteration


def call_of(settings: Settings, tile: int | None) -> Call:
    """One decode of a rollout's samples."""
    size = settings.frames, settings.height, settings.width
    kernel = "cpu" if settings.on_cpu else "flash"
    return Call(settings.model, *size, settings.scored_batch, tile, settings.frozen_dtype, kernel)


def choose(iteration: "Iteration") -> None:
    """Sets the iteration's `decode` and `tile` and says why: with "auto" tiles where a whole decode does not fit.

    Raises:
        ValueError: tiles that the VAE does not have.
    """
    s = iteration.settings
    iteration.tile = None
    iteration.decode = decode(call_of(s, None))
    if s.vae_tiling == "on":
        iteration.tile = s.vae_tile or _usual(iteration.spec, max(s.height, s.width))
    elif s.vae_tiling == "auto" and not _fits(iteration, None):
        iteration.tile = s.vae_tile or _largest(iteration)
    iteration.decode = decode(call_of(s, iteration.tile))
    iteration.reasons.append(_said(call_of(s, iteration.tile), iteration.decode))


def is_hopeless(iteration: "Iteration") -> bool:
    """Whether what rests beside a decode does not fit without one."""
    resting = added((1, iteration.resting(denoiser=False)), (1, iteration.others("vae")))
    return with_margins(iteration.settings, sum(resting.values())) > iteration.settings.gpu_gib * GIB


def needed(iteration: "Iteration", tile: int | None) -> int:
    """Bytes of the decodes of training and evaluation with their margins, in tiles of this side or whole."""
    both = (iteration.settings, iteration.settings.evaluation)
    found = max(phase(iteration, s, tile).bytes for s in both if s is not None)
    return with_margins(iteration.settings, found)


def _fits(iteration: "Iteration", tile: int | None) -> bool:
    return needed(iteration, tile) <= iteration.settings.gpu_gib * GIB


def phase(iteration: "Iteration", s: Settings, tile: int | None) -> Phase:
    """The decode of training, or of evaluation, which is not counted among an iteration's seconds."""
    call = call_of(s, tile)
    found = decode(call)
    there = (1, iteration.resting(denoiser=False)), (1, iteration.others("vae"))
    fixed, name, seconds = added(*there), "evaluation decode", 0.0
    if s is iteration.settings:
        fixed, name = added(*there, (1, {"trajectories": iteration.trajectories})), "decode"
        calls = math.ceil(s.scored / s.rollout_batch)
        seconds = calls * policies.seconds(s, found.flops, found.traffic) + iteration._carried("vae", denoiser=True)
    # Pictures become float32 and are rounded, out of place.
    made = call.pixels * (call.torch_dtype.itemsize + 2 * 4)
    moments = [
        Moment({}, "load", "vae"),
        Moment(found.peak, found.op, f"vae.{found.module}"),
        Moment({"temporaries": made}, "aten.mul", "frames"),
    ]
    return iteration._phase(name, moments, fixed, seconds)


def _usual(spec: specs.Spec, side: int) -> int:
    """The tile that "on" means for pictures of so many pixels."""
    found = rule(specs.build_vae(spec)).usual(side)
    if found is None:
        raise ValueError(f'vae_tiling: got "on" for pictures of {side} pixels, want larger ones for tiles, or "auto"')
    return found


def _largest(iteration: "Iteration") -> int | None:
    """The largest tile that fits, or the smallest if none does; None where the VAE has none for these pictures."""
    s = iteration.settings
    there = s.evaluation or s
    try:
        sizes = rule(specs.build_vae(iteration.spec)).sizes(max(s.height, s.width, there.height, there.width))
    except ValueError:
        return None
    if not sizes:
        return None
    if is_hopeless(iteration):
        return sizes[0]
    # Larger tiles take more.
    return sizes[max(bisect.bisect(sizes, False, key=lambda size: not _fits(iteration, size)) - 1, 0)]


def _said(call: Call, found: Decode) -> str:
    """How it decodes and what of its bytes is no tensor's, in words."""
    tiles = "whole" if call.tile is None else f"one by one in tiles of {call.tile} pixels"
    taken, within = sum(found.peak.values()) / GIB, found.peak.get("workspace", 0.0) / GIB
    text = f"decode {tiles}: {taken:.2f} GiB beside the weights, {within:.2f} of it "
    if call.kernel == "cpu":
        return f"{text}oneDNN's copies of a convolution's input and output"
    return (
        f"{text}cuDNN's copies of a convolution's input and output, a rule read off public measurements; "
        f"torch's allocator reserves {found.reserved / GIB:.2f} if there is room"
    )
