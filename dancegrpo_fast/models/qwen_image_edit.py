"""Qwen-Image-Edit: Qwen-Image whose text encoder sees the picture to edit, and whose calls have its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..prompts import Prompt
from ..recipe import SamplerSettings
from .guided import NEGATIVE, Conditioning
from .loading import pipeline_index
from .pictures import WithReference
from .qwen_image import QwenImage, scaled

# Of a pipeline: the pixels of a picture as the text encoder sees it, and the most tokens of text and picture here.
PIPELINES = {"QwenImageEditPlusPipeline": (384 * 384, 512), "QwenImageEditPipeline": (1024 * 1024, 2048)}
# What stands for the picture before the prompt; the template of the other pipeline has its own.
PICTURE = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
# Sides of a picture as the text encoder sees it are multiples of this.
SIDE = 32


class QwenImageEdit(WithReference, QwenImage):
    """As `QwenImageEditPlusPipeline` or `QwenImageEditPipeline` calls it, whichever the folder is of, with one picture.

    The picture is the `image` of a prompt's row. Embeddings depend on it, those of the negative prompt as well: they
    are stored by text and picture, and each row has a negative of its own.
    """

    family = "qwen_image_edit"
    pipeline = "QwenImageEditPlusPipeline"
    text_parts = ("text_encoder", "tokenizer", "processor")

    @cached_property
    def _called_as(self) -> str:
        found = str(pipeline_index(str(self.folder)).get("_class_name"))
        return found if found in PIPELINES else self.pipeline

    @property
    def _most_tokens(self) -> int:
        return self.settings.max_text_tokens or PIPELINES[self._called_as][1]

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        shape = super()._shape(sampler)
        # A prompt whose picture has a digest.
        self._prompts: dict[str, Prompt] = {}
        return shape

    def _key(self, text: str, prompt: Prompt) -> str:
        """Of a row of the store."""
        digest = self._pictures.digest(prompt)
        self._prompts.setdefault(digest, prompt)
        return f"{digest} {text}"

    def _negatives(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._key(self.sampler.negative_prompt, prompt) for prompt in prompts]

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        found = dict(super().encode(prompts))
        if self._guided_by_batch(self.sampler.guidance_scale):
            found |= {NEGATIVE + name: value for name, value in self._text(self._negatives(prompts)).items()}
        return found

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        # Each prompt has a negative of its own.
        return {} if self._guided_by_batch(guidance_scale) else None

    def _load_pipeline(self, wanted: Iterable[str], **given: Any) -> Any:
        return super()._load_pipeline(wanted, processor=picture_processor(self._part("processor")), **given)

    def _asked(self, pipeline: Any, key: str) -> tuple[str, Any]:
        """Text of a row, and its picture as the text encoder sees it."""
        digest, _, text = key.partition(" ")
        image = self._pictures.read(self._prompts[digest])
        ratio = image.width / image.height
        width = (PIPELINES[self._called_as][0] * ratio) ** 0.5
        height, width = (round(side / SIDE) * SIDE for side in (width / ratio, width))
        return text, pipeline.image_processor.resize(image, height, width)

    def _check_length(self, tokens: int, text: str) -> None:
        # The pipeline cuts nothing.
        if tokens > self._most_tokens:
            raise ValueError(
                f'model.max_text_tokens: got {self._most_tokens} for "{text}", which with its picture has {tokens}, '
                "want as many or more"
            )

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        prompt, image = self._asked(pipeline, text)
        given = [image] if self._called_as == self.pipeline else image
        embeds, mask = pipeline.encode_prompt(prompt, image=given, device=self.device)
        self._check_length(embeds.shape[1], prompt)
        return self._padded(embeds, mask)

    def _count_tokens(self, pipeline: Any, text: str) -> int:
        prompt, image = self._asked(pipeline, text)
        before = PICTURE if self._called_as == self.pipeline else ""
        asked = pipeline.processor(text=[pipeline.prompt_template_encode.format(before + prompt)], images=[image])
        count = len(asked["input_ids"][0]) - int(pipeline.prompt_template_encode_start_idx)
        self._check_length(count, prompt)
        return count

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        shapes = [(1, *self._grid), (1, *self._reference_grid)]
        return super()._inputs(latents, times, text, guidance_scale) | {"img_shapes": [shapes] * len(latents)}

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float()
        return scaled(self.vae, latents).squeeze(2)


def picture_processor(folder: Path) -> Any:
    """The `Qwen2VLProcessor` of a folder for pictures alone: its part for videos needs torchvision."""
    from transformers import Qwen2VLProcessor

    class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # untyped
        attributes = ("image_processor", "tokenizer")

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **more: Any) -> None:
            super().__init__(image_processor, tokenizer, None, **more)

    return PictureProcessor.from_pretrained(folder)
