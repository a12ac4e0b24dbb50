"""What the trainer needs of a model family, and what the families share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from ..config import ModelSettings, SamplerSettings
from ..prompts import Prompt
from ..transitions import TransitionTable
from . import quantization
from .prompt_store import PromptStore, cache_folder, given_identity, text_identity

Conditioning = Mapping[str, Tensor]


class GeneratorModel(Protocol):
    """A denoiser with its way to encode prompts, predict and decode.

    Attributes:
        denoiser: the network that is trained.
        latent_shape: one sample's latents, as the denoiser and the kernels see them.
    """

    denoiser: nn.Module
    latent_shape: tuple[int, ...]

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning tensors, one row per prompt of those the model was loaded for; rows do not depend on others."""
        ...

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        """One row for the second half of a guided batch, or None where the family or the scale needs none."""
        ...

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        """The sampler's table; `deterministic` asks for the family's ODE with the same steps."""
        ...

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Model output at `latents` `[B, *latent_shape]` and `times` `[B]`, and the unconditional one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[B, T, 3, H, W]`, float32 in [0, 1] on the 8-bit grid."""
        ...

    def tile_vae(self, on: bool) -> None:
        """Decodes in tiles, or whole."""
        ...

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: a full denoiser, or LoRA weights alone."""
        ...


class DiffusersModel:
    """The shared part of a family: parts of a diffusers pipeline, loaded one after the other.

    The VAE comes first, so that a size it cannot make is refused before anything large is read; then the text encoders,
    where the store lacks a prompt, which are freed before the denoiser is loaded.

    A family names its parts below and defines `_shape`, `_encode_text`, `table`, `predict` and `decode`. In
    `__init__`, after this class', it may check the denoiser's configuration.

    Attributes:
        family: as in recipes.
        pipeline: the pipeline's class in diffusers.
        denoiser_part, denoiser_class, vae_class: its subfolder and the classes in diffusers.
        text_parts: subfolders that encode text.
        text_tensors: what `_encode_text` gives for a prompt.
        mask: which of them is 1 for tokens of the prompt and 0 for padding; "" where there is none.
        padded: which have a token axis (the second one) and are cut after the run's longest prompt; needs `mask`.
        negative: guidance is a second half of the batch with the negative prompt.
    """

    family: ClassVar[str]
    pipeline: ClassVar[str]
    denoiser_part: ClassVar[str] = "transformer"
    denoiser_class: ClassVar[str]
    vae_class: ClassVar[str] = "AutoencoderKL"
    text_parts: ClassVar[tuple[str, ...]]
    text_tensors: ClassVar[tuple[str, ...]]
    mask: ClassVar[str] = ""
    padded: ClassVar[tuple[str, ...]] = ()
    negative: ClassVar[bool] = False

    denoiser: nn.Module
    latent_shape: tuple[int, ...]

    def __init__(
        self, settings: ModelSettings, sampler: SamplerSettings, device: torch.device, prompts: Sequence[Prompt]
    ) -> None:
        self.settings, self.sampler, self.device = settings, sampler, device
        self.dtype = settings.torch_dtype()
        self.folder = find_folder(settings.path)
        self.vae = self._part(self.vae_class, "vae").requires_grad_(False)
        if settings.vae_tiling == "on":
            self.tile_vae(True)
        self.latent_shape = self._shape(sampler)
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        if self._guided_by_batch(sampler.guidance_scale):
            texts.append(sampler.negative_prompt)
        self._store = self._open_store(texts)
        self._text_length = self._longest(texts) if self.mask else None
        self.denoiser = self._load_denoiser()
        if settings.lora is not None:
            lora = settings.lora
            add_lora(self.denoiser, lora.rank, lora.alpha, lora.target_modules, self.dtype)

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        """`latent_shape` from the VAE's configuration; raises ValueError for a size that cannot be made."""
        raise NotImplementedError

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        """`text_tensors` of one prompt, `[1, ...]`, the same shapes for every prompt (padded to `max_text_tokens`).

        Args:
            pipeline: of class `pipeline`, with the text parts only.
            text: the prompt, which may be empty.
        """
        raise NotImplementedError

    def _guided_by_batch(self, guidance_scale: float) -> bool:
        return self.negative and guidance_scale != 1.0

    def _load_denoiser(self) -> nn.Module:
        kind = self.settings.quantization
        more = quantization.loading(kind, self.device)
        if not more:
            return cast(nn.Module, self._part(self.denoiser_class, self.denoiser_part))
        try:
            return cast(nn.Module, self._part(self.denoiser_class, self.denoiser_part, **more))
        except (ImportError, RuntimeError) as error:
            raise ValueError(f'model.quantization: got "{kind}" on {self.device}, {error}') from error

    def _part(self, name: str, subfolder: str, **more: Any) -> Any:
        import diffusers

        if not (self.folder / subfolder).is_dir():
            raise ValueError(f"model.path: got {self.folder}, want {subfolder}/ in it for the family {self.family}")
        load = getattr(diffusers, name).from_pretrained
        part = load(self.folder, subfolder=subfolder, **loaded_in(self.dtype), **more)
        return part.to(self.device).eval()

    def _scheduler(self, name: str = "FlowMatchEulerDiscreteScheduler", **changes: Any) -> Any:
        """The folder's scheduler, a new one at every call."""
        import diffusers

        return getattr(diffusers, name).from_pretrained(self.folder, subfolder="scheduler", **changes)

    def _open_store(self, texts: Sequence[str]) -> PromptStore:
        parts = [part for part in self.text_parts if (self.folder / part).is_dir()]
        given = self.folder / "prompt_embeds"
        if not parts:
            if not given.is_dir():
                raise ValueError(f"model.path: got {self.folder}, want {self.text_parts} in it, or prompt_embeds/")
            store = PromptStore(given, given_identity(self.family))
            store.check(texts)
            return store
        identity = text_identity(self.family, self.folder, parts, self.settings.max_text_tokens, self.dtype)
        store = PromptStore(cache_folder(Path(self.settings.prompt_cache), identity), identity)
        store.encode(texts, self._load_text_encoders)
        return store

    def _load_text_encoders(self) -> Any:
        import diffusers

        cls = getattr(diffusers, self.pipeline)
        parts = {name for name, value in cls.load_config(self.folder).items() if isinstance(value, (list, tuple))}
        absent = dict.fromkeys(parts - set(self.text_parts))
        pipeline = cls.from_pretrained(self.folder, **loaded_in(self.dtype), **absent)
        pipeline.to(self.device)

        @torch.no_grad()
        def encode(text: str) -> Mapping[str, Tensor]:
            return self._encode_text(pipeline, text)

        return encode

    def _longest(self, texts: Sequence[str]) -> int:
        """Tokens of the longest prompt. One length for the whole run: rollout and replay must have equal shapes."""
        longest = 1
        for text in texts:
            used = self._store.rows([text], [self.mask])[self.mask][0].nonzero()
            longest = max(longest, int(used.max()) + 1 if len(used) else 1)
        return longest

    def _text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the store on the device, in the model's dtype where they are floating-point."""
        rows = self._store.rows(texts, self.text_tensors)
        for name in self.padded:
            rows[name] = rows[name][:, : self._text_length]
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in rows.items()
        }

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self._text([prompt.text for prompt in prompts])

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        return self._text([self.sampler.negative_prompt]) if self._guided_by_batch(guidance_scale) else None

    def tile_vae(self, on: bool) -> None:
        if on:
            self.vae.enable_tiling()
        else:
            self.vae.disable_tiling()

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        import diffusers

        pipeline = getattr(diffusers, self.pipeline)
        save_denoiser(denoiser, folder, self.denoiser_part, pipeline.save_lora_weights)


def guided_batch(
    latents: Tensor, times: Tensor, conditioning: Conditioning, unconditional: Conditioning | None
) -> tuple[Tensor, Tensor, Conditioning]:
    """The 2B rows of a guided call: the prompts', then as many of the unconditional row; B rows where that is None.

    What `unconditional` lacks (an image that both halves see) is the same in both halves.
    """
    if unconditional is None:
        return latents, times, conditioning
    both = {
        name: torch.cat([value, unconditional[name].expand_as(value) if name in unconditional else value])
        for name, value in conditioning.items()
    }
    return torch.cat([latents, latents]), torch.cat([times, times]), both


def split_guided(output: Tensor, unconditional: Conditioning | None) -> tuple[Tensor, Tensor | None]:
    """The halves of what `guided_batch` was made for."""
    if unconditional is None:
        return output, None
    conditional, uncond_output = output.chunk(2)
    return conditional, uncond_output


def loaded_in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`from_pretrained`'s argument for the dtype of weights, which newer diffusers call otherwise."""
    from diffusers.pipelines import pipeline_utils

    return {"dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype": dtype}


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


def find_folder(path: str) -> Path:
    """A local diffusers folder, or the local snapshot of a model on the hub, downloaded where it is not there yet.

    Raises:
        ValueError: neither, or the hub cannot be reached.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() or path.count("/") != 1 or path.startswith((".", "/")):
        raise ValueError(f"model.path: got {path}, want a diffusers folder (no model_index.json there) or a hub name")
    from diffusers import DiffusionPipeline

    # Parts that no family here uses.
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder", "image_processor"))
    try:
        return Path(DiffusionPipeline.download(path, **unused))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: got {path}, want a diffusers folder or a name on the hub that can be reached ({error})"
        ) from error


def add_lora(
    denoiser: nn.Module, rank: int, alpha: int, target_modules: Sequence[str], dtype: torch.dtype | None = None
) -> None:
    """Freezes the denoiser and adds peft LoRA layers to the modules whose names end in one of `target_modules`.

    Args:
        denoiser: a diffusers model.
        rank: of the update matrices.
        alpha: its scale is `alpha / rank`.
        target_modules: endings of module names.
        dtype: of the layers; None: peft's choice, each its module's, and float32 for some quantised ones.

    Raises:
        ValueError: no module has such a name.
    """
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(target_modules))
    try:
        denoiser.add_adapter(config)  # type: ignore[operator]  # diffusers' PeftAdapterMixin
    except ValueError as error:
        raise ValueError(f"model.lora.target_modules: got {list(target_modules)}, {error}") from error
    if dtype is not None:
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def save_denoiser(denoiser: nn.Module, folder: Path, subfolder: str, save_lora: Any) -> None:
    """`save_lora` is the pipeline class's `save_lora_weights`; without LoRA layers the whole denoiser is written."""
    if not getattr(denoiser, "peft_config", None):
        denoiser.save_pretrained(folder / subfolder)  # type: ignore[operator]  # diffusers' ModelMixin
        return
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser)
    save_lora(folder, **{f"{subfolder}_lora_layers": layers}, **_collate_lora_metadata({subfolder: denoiser}))
