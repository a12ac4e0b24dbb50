"""GenEval's rules (arXiv 2310.11513) on a transformers detector; not comparable with the official scorer's numbers.

The official detector is another Mask2Former in another framework. For numbers to publish, give the official scorer the
folders that `dancegrpo-fast evaluate` writes.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import RewardInput
from .clip import clip_model, load_towers, loaded, whole_model
from .frames import sampled_bytes
from .pixels import openai_pixels

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
MOST_OBJECTS = 16
POSITION_MARGIN = 0.1
GROUND = 0x99
# what GenEval calls classes of COCO: three have names of its own, six an older spelling in some detectors
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True)
class Found:
    """One detected object: its box (left, top, right, bottom) in pixels and its mask, bool [H, W]."""

    box: tuple[float, float, float, float]
    mask: Tensor


def instances(
    class_logits: Tensor, mask_logits: Tensor, height: int, width: int, kept: int, least: float = 0.0
) -> list[tuple[int, float, Found]]:
    """Objects of one image as (class, confidence, where), the most confident first.

    The confidence of a query's class is its probability times the mean probability within the query's mask, over the
    `kept` most probable (query, class) pairs (Mask2Former, arXiv 2112.01527). Empty masks are no objects.

    Args:
        class_logits: [Q, K + 1], the last column is "no object".
        mask_logits: [Q, H, W] at any size; they are resized to the image's.
        height, width: of the image.
        kept: how many pairs.
        least: pairs of at most this probability are left out, whose confidence cannot be more.
    """
    probabilities = _probabilities(class_logits)
    scores, order = probabilities.flatten().topk(min(kept, probabilities.numel()))
    queries, classes = order // probabilities.shape[1], order % probabilities.shape[1]
    masks = F.interpolate(mask_logits.float()[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    found = []
    for score, query, label in zip(scores.tolist(), queries.tolist(), classes.tolist(), strict=True):
        if score <= least:
            break
        mask = masks[query] > 0
        if not bool(mask.any()):
            continue
        inside = float(masks[query][mask].sigmoid().mean())
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
        found.append((label, score * inside, Found(box, mask.cpu())))
    return sorted(found, key=lambda one: -one[1])


def _probabilities(class_logits: Tensor) -> Tensor:
    return class_logits.float().softmax(dim=-1)[:, :-1]


def relations(one: Found, other: Found) -> set[str]:
    """Where `one` is relative to `other`: "left of", "right of", "above", "below", or nothing of it.

    The offset of the centres is shortened by a tenth of both sizes and measured in lengths of the whole offset; half of
    that length in a direction is enough.
    """
    offsets, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2
        sizes = one.box[high] - one.box[low] + other.box[high] - other.box[low]
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - POSITION_MARGIN * sizes, 0.0), offset))
    length = math.hypot(*offsets)
    if max(map(abs, shortened)) < 1e-3:
        return set()
    across, down = (value / length for value in shortened)
    named = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in named.items() if holds}


def is_correct(
    objects: Mapping[str, Sequence[Found]], meta: Mapping[str, Any], color_of: Callable[[Found, str], str]
) -> bool:
    """Whether an image has everything that its prompt includes, and not what it excludes.

    Args:
        objects: those of each class, the most confident first; colours and positions are asked of the first `count`.
        meta: `include`, and `exclude`, as GenEval's prompts have them.
        color_of: the colour of an object of a class.
    """
    groups: list[Sequence[Found] | None] = []
    for wanted in meta["include"]:
        name, count = wanted["class"], wanted["count"]
        first = objects.get(name, ())[:count]
        holds = len(first) == count
        if holds and "color" in wanted:
            holds = all(color_of(one, name) == wanted["color"] for one in first)
        if holds and "position" in wanted:
            relation, target = wanted["position"]
            others = groups[target]
            holds = others is not None and all(relation in relations(a, b) for a in first for b in others)
        groups.append(first if holds else None)
    excluded = any(len(objects.get(one["class"], ())) >= one["count"] for one in meta.get("exclude", ()))
    return not excluded and all(group is not None for group in groups)


def _problem(columns: Mapping[str, Any], classes: Collection[str]) -> str | None:
    """What is not as GenEval has it in the columns of a prompt, and what is wanted."""
    include, exclude = columns.get("include"), columns.get("exclude", [])
    if not isinstance(columns.get("tag"), str) or not include or not isinstance(include, list):
        return f"columns {sorted(columns)}, want GenEval's tag and include"
    if not isinstance(exclude, list):
        return f"exclude {exclude!r}, want a list as include"
    for place, wanted in enumerate([*include, *exclude]):
        if not isinstance(wanted, Mapping) or not isinstance(wanted.get("count"), int) or wanted["count"] < 1:
            return f"object {wanted!r}, want its class and a count of at least 1"
        if wanted.get("class") not in classes:
            return f'class "{wanted.get("class")}", want one of the detector\'s {len(classes)}'
        if wanted.get("color", COLORS[0]) not in COLORS:
            return f'color "{wanted["color"]}", want one of {COLORS}'
        if "position" in wanted and not _is_position(wanted["position"], min(place, len(include))):
            return f"position {wanted['position']!r}, want one of {POSITIONS} and the place of an object before it"
    return None


def _is_position(position: Any, objects: int) -> bool:
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        return False
    relation, target = position
    return relation in POSITIONS and isinstance(target, int) and 0 <= target < objects


class GenEval:
    """1.0 where an image is right in every respect of its GenEval prompt (columns tag, include, exclude), else 0.0.

    Objects count above a confidence of `threshold`, or `counting_threshold` for prompts tagged "counting", at most 16 a
    class. Classes of the detector are called what GenEval calls them (`GENEVAL_NAMES`). Colours are CLIP's choice among
    ten, on the object's box with #999 around its mask.

    Args:
        path: `Mask2FormerForUniversalSegmentation` for COCO's instances, local folder or hub name.
        clip: `CLIPModel` that tells colours.
        dtype: "float32", "bfloat16" or "float16", of both models.
        device: None: the current CUDA device if there is one, else the CPU.
        threshold, counting_threshold: confidences in [0, 1].

    Raises:
        ValueError: an argument is out of range or does not load.
    """

    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        dtype: str = "float32",
        device: str | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
    ) -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, want 0 to 1")
        self.towers = load_towers(clip_model, clip, clip, dtype, device)
        self._processor: Any = loaded("path", path, AutoImageProcessor.from_pretrained)
        model: Any = loaded("path", path, lambda place: whole_model(Mask2FormerForUniversalSegmentation, place))
        self._model = model.to(self.towers.dtype).eval().requires_grad_(False)
        self._names = {label: GENEVAL_NAMES.get(name, name) for label, name in model.config.id2label.items()}
        self._thresholds = threshold, counting_threshold
        self._colors: dict[str, Tensor] = {}
        self.to(self.towers.device)

    def to(self, device: str | torch.device) -> "GenEval":
        """Move both models, and return self."""
        self.towers.to(device)
        self._model.to(device)
        return self

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a prompt without the columns of GenEval or with a class that the detector lacks."""
        classes = set(self._names.values())
        for prompt, columns in zip(prompts, meta, strict=True):
            problem = _problem(columns, classes)
            if problem is not None:
                raise ValueError(f"prompts: got {prompt!r} with {problem}")

    @torch.no_grad()
    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return 0.0 or 1.0 a sample, float32 [B].

        Raises:
            ValueError: frames are not floats [B, 1, 3, H, W] in [0, 1], or prompts are not B; or a prompt is without
                the columns of GenEval or with a class that the detector lacks.
        """
        pixels = sampled_bytes(inputs, "all").cpu()
        if pixels.shape[1] != 1:
            raise ValueError(f"frames: got {tuple(pixels.shape)}, want images, [B, 1, 3, H, W]")
        self.check(inputs.prompts, inputs.meta)
        scores = [self._score(image, meta) for image, meta in zip(pixels[:, 0], inputs.meta, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def _score(self, pixels: Tensor, meta: Mapping[str, Any]) -> float:
        values = self._processor(pixels.permute(1, 2, 0).numpy(), return_tensors="pt")
        inputs = values["pixel_values"].to(self._model.device, self._model.dtype)
        output = self._model(inputs, pixel_mask=values["pixel_mask"].to(self._model.device))
        least = self._thresholds[meta["tag"] == "counting"]
        classes, (height, width) = output.class_queries_logits[0], pixels.shape[1:]
        # a confidence is at most its probability: the masks of most queries need not be enlarged
        likely = (_probabilities(classes) > least).any(dim=1)
        objects: dict[str, list[Found]] = {}
        if bool(likely.any()):
            masks = self._cropped(output.masks_queries_logits[0, likely], values["pixel_mask"][0])
            for label, confidence, where in instances(classes[likely], masks, height, width, 100, least):
                group = objects.setdefault(self._names[label], [])
                if confidence > least and len(group) < MOST_OBJECTS:
                    group.append(where)
        return float(is_correct(objects, meta, lambda one, name: self._color(pixels, one, name)))

    @staticmethod
    def _cropped(masks: Tensor, valid: Tensor) -> Tensor:
        """Mask logits without the processor's padding, at the size of what it kept."""
        whole = F.interpolate(masks.float()[None], size=tuple(valid.shape), mode="bilinear", align_corners=False)[0]
        return whole[:, : int(valid[:, 0].sum()), : int(valid[0].sum())]

    def _color(self, pixels: Tensor, one: Found, name: str) -> str:
        left, top, right, bottom = (int(edge) for edge in one.box)
        shown = torch.where(one.mask, pixels, torch.full_like(pixels, GROUND))[:, top:bottom, left:right]
        embedding = self.towers.images(shown[None], openai_pixels, 1)[0]
        if name not in self._colors:
            texts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
            embedded = self.towers.texts(texts, len(TEMPLATES)).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._colors[name] = F.normalize(embedded.mean(dim=1), dim=-1).cpu()
        return COLORS[int((self._colors[name] @ embedding.cpu()).argmax())]
