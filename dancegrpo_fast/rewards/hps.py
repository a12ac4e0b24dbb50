"""HPS v2.1, a CLIP ViT-H/14 tuned on human preferences (Wu et al., 2023, arXiv 2306.09341)."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..install import install_line
from .base import RewardInput
from .clip import LAION_H, ClipReward, clip_model, load_towers
from .frames import Sampling
from .pixels import letterbox_pixels

_FILE = "HPS_v2.1_compressed.pt"
_HEADS = 16  # of both towers of ViT-H/14; the shapes in a checkpoint do not tell
_OUTER = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
# printable ASCII without a character reference is what ftfy leaves alone
_FOR_FTFY = re.compile(r"[^\t\n\r -~]|&#?[0-9A-Za-z]+;")


class Hps(ClipReward):
    """Cosine of HPS v2.1's image and text embeddings, about 0.20 to 0.38; no logit scale.

    The whole image is seen, scaled to 224 pixels on its longer side between black bars. The prompt is cleaned as
    open_clip does; see `clean_prompt`.

    Args:
        path: `HPS_v2.1_compressed.pt`, a folder or hub name that holds it, or a folder with a converted `CLIPModel`.
        tokenizer: Hub name or local folder.
        dtype: As for `ClipScore`; scores of a group differ by about 0.01, so that float32 or float16 is safe.
        device, batch, frames: As for `ClipScore`.

    Raises:
        ValueError: An argument is out of range, or something does not load.
    """

    def __init__(
        self,
        path: str | Path = "xswu/HPSv2",
        tokenizer: str | Path = LAION_H,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        batch: int = 32,
        frames: Sampling = "all",
    ) -> None:
        super().__init__(load_towers(_hps_model, path, tokenizer, dtype, device), batch, frames, letterbox_pixels)

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a prompt that cannot be cleaned."""
        for prompt in prompts:
            clean_prompt(prompt)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return cosines, float32 [B].

        Raises:
            ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], are too few, or prompts are not B; or a
                prompt cannot be cleaned.
        """
        return self.cosines(inputs, [clean_prompt(prompt) for prompt in inputs.prompts])


def clean_prompt(text: str) -> str:
    """Return `text` as open_clip tokenizes it: ftfy, character references resolved twice, one space, lower case.

    Printable ASCII without a character reference (`&...;`) is what ftfy does not change; it is cleaned without it.

    Raises:
        ValueError: any other text while ftfy is not installed.
    """
    try:
        from ftfy import fix_text
    except ImportError as error:
        if _FOR_FTFY.search(text):
            raise ValueError(f"prompts: got {text!r}, want ftfy to clean it: {install_line('train')}") from error
    else:
        text = fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


def model_from_open_clip(state: Mapping[str, Tensor]) -> Any:
    """Return a `CLIPModel` with the weights of open_clip's CLIP, in float32.

    Args:
        state: the whole state dict, ViT towers with 16 heads and fused attention inputs.

    Raises:
        ValueError: a weight is missing, left over, or of a shape that does not fit.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig(**_configuration(state))
        weights = {name: tensor for key in state for name, tensor in _renamed(key, state[key].float())}
    except KeyError as error:
        raise ValueError(f"state_dict: got {len(state)} weights without {error}, want open_clip's CLIP") from error
    # empty weights first: drawing a billion random numbers takes longer than reading the file
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
    wrong = sorted(
        name
        for name in shapes.keys() | weights.keys()
        if name not in weights or weights[name].shape != shapes.get(name)
    )
    if wrong:
        raise ValueError(f"state_dict: {len(wrong)} weights do not fit a CLIPModel, {wrong[0]} for one")
    return CLIPModel.from_pretrained(None, config=config, state_dict=weights)


def _configuration(state: Mapping[str, Tensor]) -> dict[str, Any]:
    def tower(prefix: str, width: int) -> dict[str, Any]:
        blocks = {int(m[2]) for m in map(_BLOCK.fullmatch, state) if m and (m[1] or "") == prefix}
        return {
            "hidden_size": width,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": _HEADS,
            "intermediate_size": state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "hidden_act": "gelu",
        }

    patch = state["visual.conv1.weight"].shape[-1]
    words, width = state["token_embedding.weight"].shape
    vision = tower("visual.", state["visual.class_embedding"].shape[0])
    text = tower("", width)
    vision |= {"patch_size": patch, "image_size": patch * math.isqrt(state["visual.positional_embedding"].shape[0] - 1)}
    text |= {
        "vocab_size": words,
        "max_position_embeddings": state["positional_embedding"].shape[0],
        # the last two words of CLIP's vocabulary
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
    return {"vision_config": vision, "text_config": text, "projection_dim": state["visual.proj"].shape[1]}


def _renamed(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    block = _BLOCK.fullmatch(key)
    if block is None:
        if key in ("visual.proj", "text_projection"):
            tensor = tensor.T.contiguous()
        module = key.rpartition(".")[0]
        if key not in _OUTER and module in _OUTER:
            return [(_OUTER[module] + key[len(module) :], tensor)]
        return [(_OUTER.get(key, key), tensor)]
    place = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
    name, kind = block[3].rpartition(".")[::2]
    if block[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = block[3].rpartition("_")[2]
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [(f"{place}.self_attn.{letter}_proj.{kind}", part.clone()) for letter, part in parts]
    return [(f"{place}.{_INNER.get(name, name)}.{kind}", tensor)]


def _hps_model(path: str | Path) -> Any:
    place = Path(path)
    if place.is_dir():
        if (place / "config.json").is_file():
            return clip_model(place)
        place = place / _FILE
        if not place.is_file():
            raise ValueError(f"want {_FILE} or the config.json of a CLIPModel in it")
    elif not place.is_file():
        from huggingface_hub import hf_hub_download

        place = Path(hf_hub_download(str(path), _FILE))
    found = torch.load(place, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError("want a file with a state_dict")
    return model_from_open_clip(found["state_dict"])
