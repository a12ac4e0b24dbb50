"""What the model families share."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import quantization
from ..compiling import Compiled
from ..experts import SECOND, Experts
from ..lora import add_lora, check_targets
from ..memory.planning import tiles
from ..prompts import Prompt
from ..recipe import ModelSettings, SamplerSettings
from ..transitions import TransitionTable
from . import loading, saving
from .generator import of_evaluation
from .grids import to_frames
from .guided import Conditioning, guided_batch, split_guided
from .prompt_store import PromptStore, cache_folder, given_identity, text_identity
from .weights import find_source, start_with


class DiffusersModel:
    """The shared part of a family: parts of a diffusers pipeline, loaded one after the other.

    The VAE comes first, so that a size it cannot make is refused before anything large is read; then the text encoders,
    where the store lacks a prompt, which are freed before the denoiser is loaded.

    A family names its parts below and defines `_shape`, `_encode_text`, `table`, `_inputs` and `_unscaled`, and with a
    `mask` `_count_tokens`. In `_set_up` it may check the denoiser's configuration.

    Attributes:
        family, pipeline: as in recipes, and the pipeline's class in diffusers.
        denoiser_part, denoiser_class, vae_class: its subfolder and the classes in diffusers.
        text_parts: subfolders that encode text.
        text_tensors: what `_encode_text` gives for a prompt.
        mask: which of them is 1 for tokens of the prompt and 0 for padding; "" where there is none.
        padded: which have a token axis (the second one) and are cut after the run's longest prompt; needs `mask`.
        negative: guidance is a second half of the batch with the negative prompt.
        float16: it is trained in float16 elsewhere; others leave its range.
        gradient_sync, passes, compiled: what the recipe's came to, as in `GeneratorModel`.
        decodes_x0: as flows do, whose ODE ends there; with noise in the last step, the picture is free of it.
        denoiser_paths: folders or files of the denoisers, by their subfolders in a pipeline.
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
    float16: ClassVar[bool] = False
    decodes_x0: ClassVar[bool] = True

    denoiser: nn.Module
    latent_shape: tuple[int, ...]
    gradient_sync: str = "update"
    passes: Literal[2, "retain", "reweight"] = 2
    compiled: Compiled | None = None

    def __init__(
        self,
        settings: ModelSettings,
        sampler: SamplerSettings,
        device: torch.device,
        prompts: Sequence[Prompt],
        evaluation: SamplerSettings | None = None,
    ) -> None:
        self.settings, self.sampler, self.device = settings, sampler, device
        self._scales = {one.guidance_scale for one in (sampler, evaluation or sampler)}
        self.dtype, self.frozen_dtype = settings.torch_dtype(), settings.frozen_torch_dtype()
        whole = settings.denoiser is not None and not Path(settings.denoiser).is_file()
        elsewhere = (self.denoiser_part,) if whole else ()
        self.folder = loading.find_folder(settings.path, *elsewhere)
        given = settings.start_from
        self.start = None if given is None else find_source(given, self.denoiser_part, "model.start_from")
        self.denoiser_path = self._find_denoiser()
        self.vae = self._load_vae()
        if evaluation is not None:
            with of_evaluation():
                self._shape(evaluation)
        self.latent_shape = self._shape(sampler)
        if settings.vae_tiling == "on":
            try:
                self.tile_vae(self._usual_tile())
            except ValueError as error:
                raise ValueError(f"model.{error}") from error
        self.denoiser_paths = self._find_denoisers()
        # What the family cannot sample or train is said before text is encoded and the denoiser is loaded.
        self.table(sampler)
        if settings.lora is not None:
            check_targets(
                loading.without_weights(self.denoiser_class, self._config_folder(self.denoiser_path)),
                settings.lora.target_modules,
            )
        self._store = self._open_store(self._texts(prompts))
        self._text_length: int | None = None
        self.denoiser = self._load_denoisers()
        if not start_with(self) and (lora := settings.lora) is not None:
            add_lora(self.denoiser, lora.rank, lora.alpha, lora.target_modules)
        self._set_up(self.denoiser.config)

    def at(self, sampler: SamplerSettings) -> "DiffusersModel":
        """The same model for samples of another size, number of steps or guidance; weights and text are shared.

        Raises:
            ValueError: a size that cannot be made.
        """
        other = copy.copy(self)
        other.sampler = sampler
        other.latent_shape = other._shape(sampler)
        other._set_up(self.denoiser.config)
        return other

    @classmethod
    def check_prompts(cls, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError where a prompt lacks what the family needs of it, before anything is loaded."""

    @classmethod
    def reference_size(cls, settings: ModelSettings, sampler: SamplerSettings) -> tuple[int, int]:
        """Height and width in pixels of the picture that a sample edits; 0, 0 in a family without one."""
        return 0, 0

    def _usual_tile(self) -> int:
        """The side of the tiles that "on" means.

        Raises:
            ValueError: the VAE does not tile, or pictures are too small for its tiles.
        """
        side = max(self.sampler.height, self.sampler.width)
        found = self.settings.vae_tile or tiles.rule(self.vae).usual(side)
        if found is None:
            raise ValueError(
                f'vae_tiling: got "on" for pictures of {side} pixels, want larger ones for tiles, or "auto"'
            )
        return found

    def _set_up(self, config: Any) -> None:
        """Takes what calls need from the denoiser's configuration; raises ValueError for one that the family lacks."""

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        """`latent_shape` from the VAE's configuration; raises ValueError for a size that cannot be made."""
        raise NotImplementedError

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        """As in `GeneratorModel`, from `latent_shape` and the folder's scheduler."""
        raise NotImplementedError

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        """`text_tensors` of one prompt, `[1, ...]`, the same shapes for every prompt (padded to `max_text_tokens`).

        Args:
            pipeline: of class `pipeline`, with the text parts only.
            text: the prompt, which may be empty.
        """
        raise NotImplementedError

    def _count_tokens(self, pipeline: Any, text: str) -> int:
        """Tokens that `_encode_text` would mark in `mask`, by a pipeline with tokenizers and processors only."""
        raise NotImplementedError

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        """The denoiser's arguments for a call of some rows.

        Args:
            latents: as `_seen` gives them.
            times: `[B]`, of the sampler's table.
            text: rows of `encode`.
            guidance_scale: for a family that embeds it.
        """
        raise NotImplementedError

    def _unscaled(self, latents: Tensor) -> Tensor:
        """What the VAE decodes."""
        raise NotImplementedError

    def _guide(self, output: Tensor, uncond_output: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        """Both outputs for the kernel to combine, or the combination where it is not linear in them."""
        return output, uncond_output

    def _seen(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """What the denoiser sees of `latents`."""
        return latents.to(self.dtype)

    def _of_sample(self, output: Tensor) -> Tensor:
        """The part of the denoiser's output that is the sample's."""
        return output

    def _guided_by_batch(self, guidance_scale: float) -> bool:
        return self.negative and guidance_scale != 1.0

    def _part(self, name: str) -> Path:
        if not (self.folder / name).is_dir():
            raise ValueError(f"model.path: got {self.folder}, want {name}/ in it for the family {self.family}")
        return self.folder / name

    def _find_denoiser(self) -> Path:
        given, start = self.settings.denoiser, self.start
        if start is not None and start.kind == "denoiser":
            if given is not None:
                raise ValueError(f"model.denoiser: got {given} beside a whole denoiser in model.start_from, want null")
            return start.path
        return self._part(self.denoiser_part) if given is None else loading.find_denoiser(given, self.denoiser_part)

    def _find_denoisers(self) -> dict[str, Path]:
        """`denoiser_paths`; of a family whose folders may have two denoisers, of both."""
        return {self.denoiser_part: self.denoiser_path}

    @property
    def planned_as(self) -> str:
        """What the memory planner takes for this model: a name or a folder."""
        given = self.settings.denoiser
        if given is None or self.denoiser_path.is_file():
            return str(self.folder)
        return loading.published_as(given, self.denoiser_path)

    def _config_folder(self, path: Path) -> Path:
        """Where the configuration of the denoiser in `path` lies; of a file alone, in the model's folder."""
        return self._part(self.denoiser_part) if path.is_file() else path

    def _load_vae(self) -> Any:
        import diffusers

        folder = self._part("vae")
        options = loading.loaded_in(self.frozen_dtype) | loading.variant_of(folder)
        vae = getattr(diffusers, self.vae_class).from_pretrained(folder, **options)
        return vae.to(self.device).eval().requires_grad_(False)

    def _load_denoisers(self) -> nn.Module:
        found = {part: self.load_from(path, second=part == SECOND) for part, path in self.denoiser_paths.items()}
        if len(found) == 1:
            return found[self.denoiser_part]
        return Experts(found, frozen=self.settings.second_expert == "frozen")

    def load_from(self, path: Path, *, second: bool = False) -> nn.Module:
        """A whole denoiser of this family, from a folder or a file; a second one stays on the host if it can."""
        import diffusers

        cls, kind = getattr(diffusers, self.denoiser_class), self.settings.quantization
        more = quantization.loading(kind, self.device)
        config = self._config_folder(path)
        if not more:
            # What is to wait on the host is never all on the device.
            device = torch.device("cpu") if second or self.settings.blocks_to_swap != 0 else self.device
            return loading.load_denoiser(cls, path, config, self.dtype, device)
        try:
            return loading.load_denoiser(cls, path, config, self.dtype, self.device, **more)
        except (ImportError, RuntimeError) as error:
            raise ValueError(f'model.quantization: got "{kind}" on {self.device}, {error}') from error

    def _scheduler(self, name: str = "FlowMatchEulerDiscreteScheduler", **changes: Any) -> Any:
        """The folder's scheduler, a new one at every call."""
        import diffusers

        return getattr(diffusers, name).from_pretrained(self.folder, subfolder="scheduler", **changes)

    def _open_store(self, texts: Sequence[str]) -> PromptStore:
        parts = [part for part in self.text_parts if (self.folder / part).is_dir()]
        given = self.folder / "prompt_embeds"
        kind = self.settings.text_encoder_quantization
        if not parts:
            if not given.is_dir():
                raise ValueError(f"model.path: got {self.folder}, want {self.text_parts} in it, or prompt_embeds/")
            if kind is not None:
                got = f'got "{kind}" for {self.folder}, which has embeddings and no text encoders'
                raise ValueError(f"model.text_encoder_quantization: {got}, want null")
            store = PromptStore(given, given_identity(self.family))
            store.check(texts)
            return store
        longest = self.settings.max_text_tokens
        name = self.family if self._called_as == self.pipeline else f"{self.family}-{self._called_as}"
        identity = text_identity(name, self.folder, parts, longest, self.frozen_dtype, self._stored_dtype, kind)
        store = PromptStore(cache_folder(Path(self.settings.prompt_cache), identity), identity)
        store.encode(texts, self._load_text_encoders)
        return store

    @property
    def _called_as(self) -> str:
        """The class of the folder's pipeline in diffusers."""
        return self.pipeline

    @property
    def _stored_dtype(self) -> torch.dtype:
        """Of embeddings: the encoders', or the denoiser's where that is narrower, so that it sees the same."""
        return min(self.frozen_dtype, self.dtype, key=lambda dtype: dtype.itemsize)

    def _load_pipeline(self, wanted: Iterable[str], **given: Any) -> Any:
        """The pipeline with parts that are wanted from the folder, and those that are given."""
        import diffusers

        return loading.load_parts(getattr(diffusers, self._called_as), self.folder, wanted, self.frozen_dtype, **given)

    def _load_text_encoders(self) -> Any:
        names = [part for part in self.text_parts if part.startswith("text_encoder") and (self.folder / part).is_dir()]
        load, kind = partial(self._load_pipeline, self.text_parts), self.settings.text_encoder_quantization
        pipeline = loading.load_encoders(load, names, self.frozen_dtype, kind, self.device)

        @torch.no_grad()
        def encode(text: str) -> Mapping[str, Tensor]:
            row = self._encode_text(pipeline, text)
            return {name: v.to(self._stored_dtype) if v.is_floating_point() else v for name, v in row.items()}

        return encode

    def _key(self, text: str, prompt: Prompt) -> str:
        """What a row of the store is of: the text, where encoders see nothing else of the prompt."""
        return text

    def _negatives(self, prompts: Sequence[Prompt]) -> list[str]:
        """The rows of the negative prompt."""
        return [self.sampler.negative_prompt]

    def _texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Of the prompts and the negative one, each once."""
        texts = [self._key(prompt.text, prompt) for prompt in prompts]
        if any(map(self._guided_by_batch, self._scales)):
            texts += self._negatives(prompts)
        return list(dict.fromkeys(texts))

    def cut_text(self, prompts: Sequence[Prompt], multiple: int = 1) -> None:
        """Cuts text after the longest of the prompts and the negative one, encoded or not, at a multiple of a number.

        One length for the whole run, and for one that goes on longer: rollout and replay must have equal shapes.
        """
        if not self.mask:
            return
        texts = self._texts(prompts)
        missing = self._store.missing(texts)
        plain = [name for name in self.text_parts if name.startswith(("tokenizer", "processor"))]
        names = [name for name in plain if (self.folder / name).is_dir()]
        if missing and not names:
            self._store.check(missing)
        lengths = [1]
        for text in set(texts) - set(missing):
            used = self._store.rows([text], [self.mask])[self.mask][0].nonzero()
            lengths.append(int(used.max()) + 1 if len(used) else 1)
        if missing:
            pipeline = self._load_pipeline(names)
            lengths += [self._count_tokens(pipeline, text) for text in missing]
        self._text_length = -(-max(lengths) // multiple) * multiple

    def _text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the store on the device, in the model's dtype where they are floating-point."""
        rows = self._store.rows(texts, self.text_tensors)
        for name in self.padded:
            rows[name] = rows[name][:, : self._text_length]
        return {n: v.to(self.device, self.dtype if v.is_floating_point() else None) for n, v in rows.items()}

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self._text([self._key(prompt.text, prompt) for prompt in prompts])

    def encodes_with_vae(self, prompts: Sequence[Prompt]) -> bool:
        return False

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        return self._text([self.sampler.negative_prompt]) if self._guided_by_batch(guidance_scale) else None

    def turns(self, table: TransitionTable) -> Sequence[int]:
        return [0] * len(table)

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
        expert: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        rows = guided_batch(self._seen(latents, conditioning), times, conditioning, unconditional)
        turn = {"expert": expert} if len(self.denoiser_paths) > 1 else {}
        output = self._of_sample(denoiser(**self._inputs(*rows, guidance_scale), **turn, return_dict=False)[0])
        output, uncond_output = split_guided(output, unconditional)
        return (output, None) if uncond_output is None else self._guide(output, uncond_output, guidance_scale)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(self._unscaled(latents).to(self.frozen_dtype), return_dict=False)[0]
        return to_frames(pixels)

    def tile_vae(self, size: int | None) -> None:
        tiles.set_tile(self.vae, size)

    @property
    def tile(self) -> int | None:
        """The side of the tiles that are set, in pixels; None: whole."""
        return tiles.tile_of(self.vae)

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        saving.save(self.pipeline, self.denoiser_part, denoiser, folder)
