"""VideoAlign: visual quality, motion quality and text alignment of videos by VideoReward (arXiv 2501.13918)."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ._videoalign_pixels import frame_indices, frame_size, patches
from ._videoalign_prompt import AFTER, BEFORE, QUESTION, REWARD_TOKENS, VIDEO_TOKEN
from ._videoalign_weights import HEAD, folder_of, merge, read_config, read_weights
from .base import RewardInput
from .clip import loaded
from .frames import sampled_bytes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VideoReward:
    """Qwen2-VL with a linear head on three reward tokens; one forward gives VQ, MQ and TA.

    Args:
        path: folder or hub name of the checkpoint and its model_config.json.
        base: folder or hub name of the Qwen2-VL that it was trained from, with its tokenizer.
        dtype: of the weights; the head is float32.
        device: of the weights.

    Raises:
        ValueError: the checkpoint does not fit the base model, or is read in another way (see model_config.json).
    """

    def __init__(self, path: str, base: str, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoTokenizer, Qwen2VLModel

        # before, Qwen2VLModel was the language model alone
        if not hasattr(Qwen2VLModel, "get_rope_index"):
            raise ImportError("transformers >= 4.52")
        folder = loaded("path", path, folder_of)
        self.config = read_config(folder)
        self._tokenizer: Any = loaded("base", base, AutoTokenizer.from_pretrained)
        self._tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
        self._reward_ids: list[int] = self._tokenizer.convert_tokens_to_ids(list(REWARD_TOKENS))
        model: Any = loaded("base", base, Qwen2VLModel.from_pretrained)
        model.resize_token_embeddings(len(self._tokenizer), mean_resizing=False)
        # VideoReward was trained and published with its rotary frequencies in bfloat16: rounded whatever the dtype
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.bfloat16().float()
        self.model = model.to(dtype).eval().requires_grad_(False)
        self.head = torch.empty(1, model.get_input_embeddings().embedding_dim)
        weights, complete = read_weights(folder)
        state = {**self.model.state_dict(), HEAD: self.head}
        merge(state, weights, complete, self.config.lora_alpha, self.config.rslora)
        self._scored: tuple[weakref.ref[RewardInput], Tensor] | None = None
        self.to(device)

    def to(self, device: torch.device | str) -> "VideoReward":
        """Move the model."""
        self.model.to(device)
        self.head = self.head.to(device)
        return self

    def scores(self, inputs: RewardInput, batch: int) -> Tensor:
        """Return VQ, MQ and TA of each video as z-scores, float32 [B, 3] on the CPU; remembered for these inputs.

        Raises:
            ValueError: inputs that are no videos in [0, 1] with their fps, or a prompt with a token of the question.
        """
        if self._scored is None or self._scored[0]() is not inputs:
            if inputs.fps is None:
                raise ValueError("fps: got None (images), want the frames per second of videos")
            chosen = frame_indices(inputs.frames.shape[1], inputs.fps, self.config.rate)
            frames = sampled_bytes(replace(inputs, frames=inputs.frames[:, chosen]), "all")
            parts = [
                self._forward(frames[start : start + batch], inputs.prompts[start : start + batch])
                for start in range(0, len(frames), batch)
            ]
            raw = torch.cat(parts) if parts else torch.empty(0, 3)
            self._scored = weakref.ref(inputs), (raw - self.config.mean) / self.config.std
        return self._scored[1]

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt with a token of the question."""
        for prompt in prompts:
            # These tokens all begin so, and a question takes a while to split into its own.
            if "<|" in prompt:
                self._tokens(prompt, 0)

    @torch.no_grad()
    def _forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        device, vision = self.head.device, self.model.config.vision_config
        patch, merged, duration = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        size = frame_size(frames.shape[-2], frames.shape[-1], patch * merged, self.config.most_pixels)
        pixels, (t, h, w) = patches(frames.to(device), size, patch, merged, duration)
        rows = [self._tokens(prompt, t * h * w // merged**2) for prompt in prompts]
        longest = max(len(row) for row in rows)
        # causal attention never looks at padding on the right: without a mask it keeps its fast kernels
        ids = torch.tensor([row + [self._tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        hidden: Tensor = self.model(
            input_ids=ids.to(device),
            # the checkpoint was trained with text positions on all three axes, also within the video
            position_ids=torch.arange(longest, device=device).expand(3, len(rows), longest),
            pixel_values_videos=pixels.to(self.model.dtype),
            video_grid_thw=torch.tensor([[t, h, w]] * len(rows), device=device),
            use_cache=False,
        ).last_hidden_state
        places = torch.tensor([[row.index(token) for token in self._reward_ids] for row in rows], device=device)
        found = hidden[torch.arange(len(rows), device=device)[:, None], places]
        return (found.float() @ self.head[0]).cpu()

    def _tokens(self, prompt: str, video_tokens: int) -> list[int]:
        text = BEFORE + VIDEO_TOKEN * video_tokens + AFTER.format(question=QUESTION.format(text_prompt=prompt))
        ids: list[int] = self._tokenizer(text)["input_ids"]
        wanted = {**dict.fromkeys(self._reward_ids, 1), self.model.config.video_token_id: video_tokens}
        if any(ids.count(token) != count for token, count in wanted.items()):
            raise ValueError(f"prompts: got {prompt!r}, want a text without {VIDEO_TOKEN} and {REWARD_TOKENS}")
        return ids


# One model and one forward for all rewards of a process that ask for the same.
_SHARED: weakref.WeakValueDictionary[tuple[str, ...], VideoReward] = weakref.WeakValueDictionary()


class _Dimension:
    """One column of `VideoReward`.

    Args:
        path: folder or hub name of VideoReward: model_config.json and `checkpoint-<step>`.
        base: folder or hub name of Qwen2-VL-2B-Instruct.
        batch: videos per forward.
        dtype: of the weights: "bfloat16" as published, "float16" or "float32".
        device: of the weights; None: the current CUDA device if there is one, else the CPU.

    Raises:
        ValueError: `batch` or `dtype` is out of range, or the checkpoint does not fit.
    """

    _column: int

    def __init__(
        self,
        path: str | Path = "KwaiVGI/VideoReward",
        base: str | Path = "Qwen/Qwen2-VL-2B-Instruct",
        batch: int = 4,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        device: str | torch.device | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: got {batch}, want at least 1")
        if dtype not in _DTYPES:
            raise ValueError(f'dtype: got "{dtype}", want one of {sorted(_DTYPES)}')
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        self.batch = batch
        key = (str(path), str(base), dtype, str(device))
        shared = _SHARED.get(key)
        if shared is None:
            shared = _SHARED[key] = VideoReward(key[0], key[1], _DTYPES[dtype], torch.device(device))
        self.model = shared

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a prompt with a token of the question."""
        self.model.check(prompts)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return one z-score per video, float32 [B].

        Raises:
            ValueError: inputs that are no videos in [0, 1] with their fps, or a prompt with a token of the question.
        """
        return self.model.scores(inputs, self.batch)[:, self._column]

    def to(self, device: torch.device | str) -> "_Dimension":
        """Move the model, which the other dimensions share."""
        self.model.to(device)
        return self


class VideoQuality(_Dimension):
    """Visual quality (VQ): clarity, detail and plausibility of the frames."""

    _column = 0


class MotionQuality(_Dimension):
    """Motion quality (MQ): stability, naturalness and amount of motion."""

    _column = 1


class TextAlignment(_Dimension):
    """Text alignment (TA): how well the video follows its prompt."""

    _column = 2
