"""CLIP's two towers (transformers' `CLIPModel`) as the rewards use them: loaded, batched, each prompt encoded once."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import RewardInput
from .frames import Sampling, check_sampling, sampled_bytes
from .pixels import clip_pixels

# where the tokenizer of ViT-H/14 is: HPS and PickScore are that model tuned
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
REMEMBERED = 10_000  # embeddings of prompts, 4 KiB each for ViT-H/14
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_alive: "WeakValueDictionary[tuple[Any, ...], Towers]" = WeakValueDictionary()

Preparation = Callable[[Tensor, int], Tensor]
_T = TypeVar("_T")


class Towers:
    """The image tower, and the text tower where there is a tokenizer, with frozen weights.

    A prompt longer than the context (77 tokens) is cut as transformers' and open_clip's tokenizers do: its first 75
    tokens between start and end. Embeddings of up to `REMEMBERED` prompts are kept on the CPU, as long as this lives.

    Args:
        model: `CLIPModel`; without a tokenizer its text tower may be missing.
        tokenizer: of the text tower, None for images only.
        dtype: of the weights.
        device: where they are.
    """

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model.to(dtype).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._known: dict[str, Tensor] = {}
        self.dtype = dtype
        self.image_size = int(model.config.vision_config.image_size)
        self.width = int(model.visual_projection.out_features)
        self.to(device)

    def to(self, device: str | torch.device) -> "Towers":
        """Move the weights, and return self."""
        self.device = torch.device(device)
        self._model.to(self.device)
        return self

    @torch.no_grad()
    def images(self, pixels: Tensor, prepare: Preparation, batch: int) -> Tensor:
        """Embed uint8 [M, 3, H, W] into unit vectors, float32 [M, D] on the towers' device.

        Args:
            pixels: on any device; at most `batch` of them are moved and prepared at a time.
            prepare: makes float32 [m, 3, image_size, image_size] of them.
            batch: images in one call of the tower.
        """
        rows = [torch.empty(0, self.width, device=self.device)]
        for part in pixels.split(batch) if len(pixels) else ():
            values = prepare(part.to(self.device), self.image_size).to(self.dtype)
            pooled = self._model.vision_model(pixel_values=values).pooler_output
            rows.append(F.normalize(self._model.visual_projection(pooled).float(), dim=-1))
        return torch.cat(rows)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], batch: int) -> Tensor:
        """Embed B prompts into unit vectors, float32 [B, D] on the towers' device; only new ones are encoded."""
        distinct = list(dict.fromkeys(prompts))
        new = [prompt for prompt in distinct if prompt not in self._known]
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
            new = distinct
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            # always the full context: the text tower is causal, and no prompt depends on its neighbours' lengths
            tokens = self._tokenizer(
                part,
                padding="max_length",
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            pooled = self._model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
            embeds = F.normalize(self._model.text_projection(pooled).float(), dim=-1).cpu()
            self._known.update(zip(part, embeds.unbind(), strict=True))
        rows = [self._known[prompt] for prompt in prompts]
        return torch.stack(rows).to(self.device) if rows else torch.empty(0, self.width, device=self.device)


class ClipReward:
    """What the rewards on CLIP share: frames to embeddings, cosines with the prompts, moving between devices."""

    def __init__(self, towers: Towers, batch: int, frames: Sampling, prepare: Preparation = clip_pixels) -> None:
        if batch < 1:
            raise ValueError(f"batch: got {batch}, want at least 1")
        self.towers, self.batch, self.frames = towers, batch, check_sampling(frames)
        self._prepare = prepare

    def to(self, device: str | torch.device) -> Any:
        """Move the model to `device`, where it stays until moved again, and return self."""
        self.towers.to(device)
        return self

    def embeddings(self, inputs: RewardInput) -> Tensor:
        """Return unit vectors of the sampled frames, float32 [B, F, D].

        Raises:
            ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], are too few, or prompts are not B.
        """
        pixels = sampled_bytes(inputs, self.frames)
        found = self.towers.images(pixels.flatten(0, 1), self._prepare, self.batch)
        return found.reshape(*pixels.shape[:2], self.towers.width)

    def cosines(self, inputs: RewardInput, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each sample with its prompt, averaged over its frames, float32 [B] on the CPU."""
        images = self.embeddings(inputs)
        texts = self.towers.texts(prompts, self.batch)
        return (images * texts[:, None]).sum(dim=-1).mean(dim=1).cpu()


def load_towers(
    make: Callable[[str | Path], Any],
    path: str | Path,
    tokenizer: str | Path | None,
    dtype: str,
    device: str | torch.device | None,
) -> Towers:
    """Return the towers that `make(path)` loads; those that still live with the same arguments are shared.

    Args:
        make: loads the model on the CPU.
        path: a local file or folder, or a hub name.
        tokenizer: a local folder or a hub name; None: images only.
        dtype: "float32", "bfloat16" or "float16".
        device: None: the current CUDA device if there is one, else the CPU.

    Raises:
        ValueError: an argument is out of range or does not load.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, want one of {sorted(_DTYPES)}")
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    key = (make, str(path), str(tokenizer), dtype, str(where))
    towers = _alive.get(key)
    if towers is None:
        from transformers import AutoTokenizer

        words = None if tokenizer is None else loaded("tokenizer", tokenizer, AutoTokenizer.from_pretrained)
        towers = _alive[key] = Towers(loaded("path", path, make), words, _DTYPES[dtype], where)
    return towers.to(where)


def loaded(name: str, path: str | Path, load: Callable[[str | Path], _T]) -> _T:
    """Return `load(path)`.

    Raises:
        ValueError: nothing is there, or it does not load; the message begins with `name` and `path`.
    """
    local = Path(path).expanduser()
    if not local.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise ValueError(f"{name}: got {str(path)!r}, want an existing file or folder, or a hub name")
    with _named(name, path):
        return load(local if local.exists() else str(path))


def clip_model(path: str | Path) -> Any:
    """Return `CLIPModel.from_pretrained(path)`, on the CPU.

    Raises:
        ValueError: a weight of the model is not in the checkpoint.
    """
    from transformers import CLIPModel

    return whole_model(CLIPModel, path)


def whole_model(kind: Any, path: str | Path) -> Any:
    """Return `kind.from_pretrained(path)` for a class of transformers, on the CPU.

    Raises:
        ValueError: a weight of the model is not in the checkpoint.
    """
    model, report = kind.from_pretrained(path, output_loading_info=True)
    # transformers draws missing weights at random and only warns
    absent = sorted({name for name, _ in model.named_parameters()} & set(report["missing_keys"]))
    if absent:
        raise ValueError(f"want a {kind.__name__}, {len(absent)} of its weights are not there, {absent[0]} for one")
    return model


@contextmanager
def _named(name: str, path: str | Path) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: got {str(path)!r}, which does not load: {error}") from error
