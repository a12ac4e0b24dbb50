"""Parts of tiny pipelines, with weights drawn here."""

import string
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LETTERS = string.ascii_lowercase


def randomised(model: nn.Module) -> nn.Module:
    """Nothing at 0 or 1, as trained weights are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def clip_tokenizer(length: int = 12) -> Any:
    """A letter is a token."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=length)


def clip_encoder(width: int, positions: int = 12, **settings: Any) -> nn.Module:
    """One with a projection where `settings` names its width."""
    config = transformers.CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        **{"num_hidden_layers": 1} | settings,
    )
    made = transformers.CLIPTextModelWithProjection if "projection_dim" in settings else transformers.CLIPTextModel
    return randomised(made(config))


def language_model(words: int, width: int, layers: int, end: int) -> dict[str, Any]:
    """The settings of one whose sequences begin, end and are filled with the token `end`."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"vocab_size": words, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers}
    return sizes | heads | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), end)


def t5_tokenizer() -> Any:
    """A letter is a token."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0)]
    return transformers.T5TokenizerFast([*special, *((letter, -2.0) for letter in LETTERS)], extra_ids=0)


def t5_encoder(kind: str, width: int) -> nn.Module:
    """`kind`: "T5" or "UMT5"."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(LETTERS) + 4, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return randomised(getattr(transformers, f"{kind}EncoderModel")(config))


def image_vae(**settings: Any) -> nn.Module:
    """In float32, of images in colour."""
    return diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **settings,
    )


def flux_transformer(width: int, **settings: Any) -> nn.Module:
    """One block of either kind, if `settings` says no other number; `width` is the text's."""
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(2, 2, 4),
        **{"num_layers": 1, "num_single_layers": 1} | settings,
    )


def unet(width: int, **settings: Any) -> nn.Module:
    """Two levels, of which one attends to text of this width."""
    fixed: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 4, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        **fixed | settings,
    )
