"""Wan, text to video: latents `[B, 16, T, H / 8, W / 8]`, a rectified flow, guidance by a negative prompt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..experts import SECOND
from ..recipe import SamplerSettings
from ..transitions import TransitionTable, shifted_sigmas
from .base import DiffusersModel
from .flow import flow_sigmas, flow_table
from .grids import video_grid
from .guided import Conditioning
from .qwen_image import unscaled


class Wan(DiffusersModel):
    """`WanTransformer3DModel` with `AutoencoderKLWan` and UMT5, as `WanPipeline` calls them.

    Wan 2.1 text to video, and Wan 2.2's 5B and A14B, whose second transformer takes the steps below a boundary. The
    published scheduler is a multistep solver, which is no Markov chain: its shift is taken, with Euler steps.
    """

    family = "wan"
    pipeline = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    text_parts = ("text_encoder", "tokenizer")
    text_tensors = ("prompt_embeds",)
    negative = True

    def _find_denoisers(self) -> dict[str, Path]:
        first = super()._find_denoisers()
        if self._boundary is None:
            return first
        if self.start is not None and self.start.kind == "denoiser":
            raise ValueError(
                f"model.start_from: got a whole denoiser in {self.settings.start_from} for a model of two, want both "
                "in model.path"
            )
        return first | {SECOND: self._part(SECOND)}

    def turns(self, table: TransitionTable) -> Sequence[int]:
        if self._boundary is None:
            return super().turns(table)
        # As the pipeline compares its timesteps, in float32.
        return [int(np.float32(1000) * np.float32(time) < 1000 * self._boundary) for time in table.numbers]

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        self._boundary: float | None = index.get("boundary_ratio")
        # Wan 2.2's 5B has a time for each token; in text to video they are equal.
        self._times_per_token = bool(index.get("expand_timesteps"))
        config = self.vae.config
        space, time = int(config.scale_factor_spatial), int(config.scale_factor_temporal)
        # The transformer's patches are two by two.
        return (int(config.z_dim), *video_grid(sampler, 2 * space, space, time))

    def _set_up(self, config: Any) -> None:
        if config.in_channels != self.latent_shape[0]:
            raise ValueError(
                f"model.path: got {self.folder}, whose transformer takes {config.in_channels} channels for "
                f"{self.latent_shape[0]} of latents, want text to video"
            )

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_text_tokens or 512,
            device=self.device,
        )
        return {"prompt_embeds": embeds}

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = FlowMatchEulerDiscreteScheduler.load_config(self.folder, subfolder="scheduler")
        if config["_class_name"] == "FlowMatchEulerDiscreteScheduler":
            sigmas = flow_sigmas(sampler, self._scheduler(), linear=False)
        else:
            sigmas = shifted_sigmas(sampler.num_steps, sampler.shift or config["flow_shift"])
        return flow_table(sampler, sigmas, deterministic)

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        times = 1000 * times
        if self._times_per_token:
            frames, height, width = self.latent_shape[1:]
            times = times[:, None].expand(-1, frames * height * width // 4)
        return {"hidden_states": latents, "timestep": times, "encoder_hidden_states": text["prompt_embeds"]}

    def _unscaled(self, latents: Tensor) -> Tensor:
        return unscaled(self.vae, latents)
