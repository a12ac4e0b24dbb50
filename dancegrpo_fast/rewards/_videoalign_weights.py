"""The checkpoint of VideoReward: its folders, its key layouts, and its LoRA merged into the base model."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEAD = "rm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
# of the published model_config.json, for folders whose file has no inference_config
_MEANS_AND_STDS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


@dataclass(frozen=True)
class RewardConfig:
    """What model_config.json says.

    Attributes:
        rate: frames that the model sees of each second of a video.
        most_pixels: of a frame.
        lora_alpha: numerator of LoRA's factor.
        rslora: the factor is `alpha / sqrt(r)` instead of `alpha / r`.
        mean: of raw VQ, MQ and TA, float32 [3].
        std: of the same.
    """

    rate: float
    most_pixels: int
    lora_alpha: float
    rslora: bool
    mean: Tensor
    std: Tensor


def folder_of(path: str | Path) -> Path:
    """Return `path` where it is a folder, else the hub repository of that name, downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    files = ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")
    return Path(
        snapshot_download(str(path), allow_patterns=["model_config.json", *(f"checkpoint-*/{one}" for one in files)])
    )


def read_config(folder: Path) -> RewardConfig:
    """Read model_config.json.

    Raises:
        ValueError: there is none, or it describes a model whose scores are read in another way.
    """
    file = folder / "model_config.json"
    if not file.is_file():
        raise ValueError(f"path: got {folder}, want a folder with model_config.json")
    whole: dict[str, dict[str, Any]] = json.loads(file.read_text())
    data, model, lora = (whole.get(key) or {} for key in ("data_config", "model_config", "peft_lora_config"))
    for section, key, wanted in (
        (data, "prompt_template_type", "detailed_special"),
        (data, "sample_type", "uniform"),
        (data, "num_frames", None),
        (model, "use_special_tokens", True),
        (model, "output_dim", 1),
    ):
        if section.get(key) != wanted:
            raise ValueError(f"path: got {key} = {section.get(key)!r} in {file}, want {wanted!r}")
    scales = whole.get("inference_config")
    pairs = [
        (scales[f"{name}_mean"], scales[f"{name}_std"]) if scales else published
        for name, published in _MEANS_AND_STDS.items()
    ]
    mean, std = torch.tensor(pairs, dtype=torch.float32).T
    return RewardConfig(
        float(data["fps"]),
        int(data["max_frame_pixels"]),
        float(lora.get("lora_alpha", 0)),
        bool(lora.get("use_rslora", False)),
        mean,
        std,
    )


def read_weights(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of the newest `checkpoint-<step>` in a folder, or of the folder itself.

    Returns:
        tensors by the names of the file, and whether they are the whole model (`model.pth`) or only what was trained
        (`adapter_model.safetensors` with `non_lora_state_dict.pth`).

    Raises:
        ValueError: neither is there.
    """
    steps = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda one: int(one.name.rpartition("-")[2]))
    place = steps[-1] if steps else folder
    if (place / "model.pth").is_file():
        return torch.load(place / "model.pth", map_location="cpu", weights_only=True, mmap=True), True
    adapter, others = place / "adapter_model.safetensors", place / "non_lora_state_dict.pth"
    if adapter.is_file() and others.is_file():
        from safetensors.torch import load_file

        return {**load_file(adapter), **torch.load(others, map_location="cpu", weights_only=True)}, False
    raise ValueError(f"path: got {place}, want model.pth, or adapter_model.safetensors and non_lora_state_dict.pth")


def merge(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], complete: bool, alpha: float, rslora: bool
) -> None:
    """Write a checkpoint into the parameters of the base model, its LoRA merged in float32.

    `W + alpha / r B A` (arXiv 2106.09685), with `sqrt(r)` for rank-stabilised LoRA (arXiv 2312.03732).

    Args:
        state: parameters by the names of `Qwen2VLModel`, and the head as "rm_head.weight"; changed in place.
        weights: of the checkpoint, by the names of any layout of Qwen2-VL, with or without peft's.
        complete: `weights` must hold every parameter, not only the head and the token embeddings.
        alpha: of LoRA.
        rslora: see above.

    Raises:
        ValueError: a weight is missing, unknown or of another shape.
    """
    plain: dict[str, Tensor] = {}
    lora: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        name = _name(key)
        found = _LORA.fullmatch(name)
        if found:
            pair = lora.setdefault(f"{found['module']}.weight", {})
            # an embedding is the transpose of a linear layer
            side, turned = found["side"], found["embedding"]
            pair[({"A": "B", "B": "A"}[side]) if turned else side] = tensor.T if turned else tensor
        elif not name.startswith("lm_head.") and ".original_module." not in name:
            plain[name] = tensor
    lora = {name: pair for name, pair in lora.items() if not name.startswith("lm_head.")}
    required = set(state) if complete else {HEAD, EMBEDDING}
    missing, unknown = sorted(required - set(plain)), sorted((set(plain) | set(lora)) - set(state))
    halves = sorted(name for name, pair in lora.items() if len(pair) != 2)
    for trouble, names in (("lacks", missing), ("has unknown", unknown), ("has half a LoRA of", halves)):
        if names:
            raise ValueError(f"path: got a checkpoint that {trouble} {names[0]} and {len(names) - 1} others")
    with torch.no_grad():
        for name in plain.keys() | lora.keys():
            weight = plain.get(name, state[name])
            if name in lora:
                a, b = lora[name]["A"].float(), lora[name]["B"].float()
                rank = a.shape[0]
                weight = weight.float() + b @ a * (alpha / (math.sqrt(rank) if rslora else rank))
            if weight.shape != state[name].shape:
                got, want = tuple(weight.shape), tuple(state[name].shape)
                raise ValueError(f"path: got {name} of shape {got}, want {want}")
            state[name].copy_(weight)


def _name(key: str) -> str:
    """The name in `Qwen2VLModel` of a key of Qwen2VLForConditionalGeneration, of either layout, inside peft or not."""
    name = key.removeprefix("base_model.model.")
    for old, new in (("model.visual.", "visual."), ("model.language_model.", "language_model.")):
        if name.startswith(old):
            name = new + name.removeprefix(old)
    if name.startswith("model."):
        name = "language_model." + name.removeprefix("model.")
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
