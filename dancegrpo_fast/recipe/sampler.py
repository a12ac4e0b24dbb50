"""`sampler:` of a recipe."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..prompts import check_text
from .checks import at_least, check_fields, positive


@dataclass
class SamplerSettings:
    """How samples are drawn in the rollout, and again in the replay.

    Args:
        kind: "dance_sde", "flow_sde", "cps" or "ode" for flows, "ddim" or "vp_sde" for diffusion.
        num_steps: T.
        eta: noise level of the sampler.
        shift: of the flow's schedule; null takes the scheduler's own.
        guidance_scale: classifier-free guidance, or the guidance embedding where the model has one; 1 is off.
        guidance_scale_2: of the second of two denoisers, where it differs; null: as `guidance_scale`.
        height: of the images, in pixels.
        width: of the images, in pixels.
        frames: of a video, in the pixels of its VAE; 1 is an image.
        fps: frames per second, which rewards of videos need.
        negative_prompt: what classifier-free guidance leads away from.
        shared_noise: all samples of a prompt start from the same noise, and step 0 is computed once per prompt.
        window: steps that stay stochastic, the others follow the ODE; null: all.
        latents_dtype: in which trajectories are stored.
    """

    kind: Literal["dance_sde", "flow_sde", "cps", "ode", "ddim", "vp_sde"]
    num_steps: int
    eta: float
    height: int
    width: int
    shift: float | None = None
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None
    frames: int = 1
    fps: float | None = None
    negative_prompt: str = ""
    shared_noise: bool = True
    window: list[int] | None = None
    latents_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_fields("sampler", self)
        at_least("sampler.num_steps", self.num_steps, 2)
        at_least("sampler.eta", self.eta, 0)
        positive("sampler.height", self.height)
        positive("sampler.width", self.width)
        at_least("sampler.frames", self.frames, 1)
        if self.fps is not None:
            positive("sampler.fps", self.fps)
        second = self.guidance_scale_2
        if second is not None and (second == 1) != (self.guidance_scale == 1):
            raise ValueError(
                f"sampler.guidance_scale_2: got {second} with guidance_scale {self.guidance_scale}, want both 1 or none"
            )
        for step in self.window or ():
            if not 0 <= step < self.num_steps:
                raise ValueError(f"sampler.window: got {step}, want steps from 0 to {self.num_steps - 1}")
        check_text("sampler.negative_prompt", self.negative_prompt)

    def torch_dtype(self) -> torch.dtype:
        """`latents_dtype` as torch names it."""
        return torch.bfloat16 if self.latents_dtype == "bfloat16" else torch.float32
