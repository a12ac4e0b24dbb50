"""The blocks that are counted: real configurations, with the inputs that their models give them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

BF16 = torch.bfloat16
# All linear layers of a block but those of its modulation.
ADAPTED = r".*blocks\.0\..*(to_q|to_k|to_v|to_out\.0|add_\w_proj|to_add_out|proj|net\.2|proj_mlp|proj_out)"


@dataclass(frozen=True)
class Sizes:
    """Of one block and its inputs."""

    heads: int
    head_dim: int
    image: int
    text: int
    # Tokens of the first frame.
    frame: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """C of the model."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Setup:
    """A model with one block, and what the block is called with."""

    model: nn.Module
    block: nn.Module
    arguments: dict[str, Any]
    # Where hidden_states and encoder_hidden_states are two parts of one tensor.
    whole: Tensor | None = None

    @property
    def asked(self) -> list[Tensor]:
        """Inputs whose gradients are wanted."""
        names = ("hidden_states", "encoder_hidden_states", "temb", "token_replace_emb")
        found = (self.arguments.get(name) for name in names)
        return [t for t in found if t is not None and t.requires_grad]


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    model: str
    block: str
    sizes: Sizes
    build: Callable[[Sizes], Setup]

    @property
    def tokens(self) -> int:
        """Of the image and the text, over which a U is counted."""
        return self.sizes.image + self.sizes.text

    @property
    def unit(self) -> int:
        """Bytes of one U."""
        return 2 * self.tokens * self.sizes.channels

    def make(self, frozen: bool = False, lora: int = 0) -> Setup:
        """A model and inputs; `frozen` without gradients of parameters and of the modulation's input.

        `lora`: the rank of float32 LoRA layers on frozen parameters.
        """
        setup = self.build(self.sizes)
        if lora:
            _adapt(setup.model, lora)
        if frozen:
            setup.model.requires_grad_(False)
        if frozen or lora:
            for name in ("temb", "token_replace_emb"):
                if name in setup.arguments:
                    setup.arguments[name].requires_grad_(False)
        return setup


def _cast(model: Any) -> None:
    """bfloat16, but for what diffusers keeps in float32 when it loads a model; `to` cannot swap fake parameters."""
    kept = set(model._keep_in_fp32_modules or ())
    for path, parameter in list(model.named_parameters()):
        owner, _, name = path.rpartition(".")
        dtype = torch.float32 if kept & set(path.split(".")) else BF16
        model.get_submodule(owner)._parameters[name] = nn.Parameter(torch.empty_like(parameter, dtype=dtype))


def _adapt(model: Any, rank: int) -> None:
    """LoRA layers, which peft makes in float32; `to` cannot move fake parameters."""
    from peft import LoraConfig

    with mock.patch.object(nn.Module, "to", lambda module, *where, **more: module):
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _rows(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=BF16).requires_grad_(grad)


def _streams(sizes: Sizes, text_first: bool | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image and text; `text_first` is given for the two parts of one tensor."""
    if text_first is None:
        return _rows(1, sizes.image, sizes.channels), _rows(1, sizes.text, sizes.channels), None
    whole = _rows(1, sizes.image + sizes.text, sizes.channels)
    cut = sizes.text if text_first else sizes.image
    first, second = whole[:, :cut], whole[:, cut:]
    return (second, first, whole) if text_first else (first, second, whole)


def _tables(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, dim), torch.empty(rows, dim)


def _flux(sizes: Sizes, single: bool) -> Setup:
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        num_layers=0 if single else 1,
        num_single_layers=1 if single else 0,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        guidance_embeds=True,
        **sizes.extra,
    )
    _cast(model)
    image, text, whole = _streams(sizes, True if single else None)
    arguments = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "temb": _rows(1, sizes.channels),
        "image_rotary_emb": _tables(sizes.image + sizes.text, sizes.head_dim),
    }
    block = (model.single_transformer_blocks if single else model.transformer_blocks)[0]
    return Setup(model, block, arguments, whole)


def _hunyuan(sizes: Sizes, single: bool, replaced: bool = False) -> Setup:
    import diffusers

    model = diffusers.HunyuanVideoTransformer3DModel(
        num_layers=0 if single else 1,
        num_single_layers=1 if single else 0,
        num_refiner_layers=1,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        image_condition_type="token_replace" if replaced else None,
        **sizes.extra,
    )
    _cast(model)
    image, text, whole = _streams(sizes, False if single else None)
    arguments = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "temb": _rows(1, sizes.channels),
        "attention_mask": torch.empty(1, 1, 1, sizes.image + sizes.text, dtype=torch.bool),
        "image_rotary_emb" if single else "freqs_cis": _tables(sizes.image, sizes.head_dim),
    }
    if replaced:
        arguments |= {"token_replace_emb": _rows(1, sizes.channels), "num_tokens": sizes.frame}
    block = (model.single_transformer_blocks if single else model.transformer_blocks)[0]
    return Setup(model, block, arguments, whole)


def _sd3(sizes: Sizes, dual: bool = False) -> Setup:
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        # The last block does without the text's output.
        num_layers=2,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        caption_projection_dim=sizes.channels,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm",
        **sizes.extra,
    )
    _cast(model)
    image, text, _ = _streams(sizes)
    arguments = {"hidden_states": image, "encoder_hidden_states": text, "temb": _rows(1, sizes.channels)}
    return Setup(model, model.transformer_blocks[0], arguments)


def _qwen(sizes: Sizes) -> Setup:
    import diffusers

    model = diffusers.QwenImageTransformer2DModel(
        num_layers=1, num_attention_heads=sizes.heads, attention_head_dim=sizes.head_dim, **sizes.extra
    )
    _cast(model)
    image, text, _ = _streams(sizes)
    arguments = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": None,
        "temb": _rows(1, sizes.channels),
        "image_rotary_emb": tuple(
            torch.empty(rows, sizes.head_dim // 2, dtype=torch.complex64) for rows in (sizes.image, sizes.text)
        ),
    }
    return Setup(model, model.transformer_blocks[0], arguments)


def _wan(sizes: Sizes) -> Setup:
    import diffusers

    model = diffusers.WanTransformer3DModel(
        num_layers=1, num_attention_heads=sizes.heads, attention_head_dim=sizes.head_dim, **sizes.extra
    )
    _cast(model)
    image, text, _ = _streams(sizes)
    rotary = tuple(torch.empty(1, sizes.image, 1, sizes.head_dim) for _ in range(2))
    arguments = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        # bfloat16 from the model; the block adds it to its table in float32.
        "temb": _rows(1, 6, sizes.channels),
        "rotary_emb": rotary,
    }
    return Setup(model, model.blocks[0], arguments)


# 53 frames of 480 x 640: 14 latent frames of 30 x 40 tokens.
HUNYUAN = Sizes(24, 128, 14 * 30 * 40, 256, frame=30 * 40)
FLUX = Sizes(24, 128, 4096, 512)
CONFIGURATIONS = (
    Configuration("HunyuanVideo", "double", HUNYUAN, lambda s: _hunyuan(s, False)),
    Configuration("HunyuanVideo", "single", HUNYUAN, lambda s: _hunyuan(s, True)),
    Configuration("HunyuanVideo token replace", "double", HUNYUAN, lambda s: _hunyuan(s, False, True)),
    Configuration("HunyuanVideo token replace", "single", HUNYUAN, lambda s: _hunyuan(s, True, True)),
    Configuration("FLUX.1-dev", "double", FLUX, lambda s: _flux(s, False)),
    Configuration("FLUX.1-dev", "single", FLUX, lambda s: _flux(s, True)),
    Configuration("SD3.5-medium", "joint, dual", Sizes(24, 64, 4096, 333), lambda s: _sd3(s, True)),
    Configuration("SD3.5-medium", "joint", Sizes(24, 64, 4096, 333), _sd3),
    Configuration("SD3.5-large", "joint", Sizes(38, 64, 4096, 333), _sd3),
    Configuration("Qwen-Image", "double", FLUX, _qwen),
    # 81 frames of 480 x 832.
    Configuration("Wan 2.1 14B", "block", Sizes(40, 128, 21 * 30 * 52, 512, extra={"ffn_dim": 13824}), _wan),
)
