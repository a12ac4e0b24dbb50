"""Tiny transformers of every family that can be accelerated, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..models import parts
from ..tolerances import DRAW, FORMULA, assert_within_budget

diffusers = pytest.importorskip("diffusers")

Inputs = dict[str, Any]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
IN_AND_OUT = {"in_channels": 4, "out_channels": 4}
SINGLE = {"num_single_layers": 2}
FLUX = HEADS | SINGLE | {"num_attention_heads": 4, "in_channels": 8, "joint_attention_dim": 24}
FLUX |= {"pooled_projection_dim": 12, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}
HUNYUAN = HEADS | SINGLE | IN_AND_OUT | {"num_refiner_layers": 1, "text_embed_dim": 12}
HUNYUAN |= {"pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)}
SD3 = IN_AND_OUT | {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24}
SD3 |= {"sample_size": 8, "patch_size": 2, "caption_projection_dim": 32, "pooled_projection_dim": 12}
SD3 |= {"pos_embed_max_size": 8}
QWEN = HEADS | {"num_attention_heads": 3, "in_channels": 8, "out_channels": 2, "joint_attention_dim": 24}
QWEN |= {"axes_dims_rope": (4, 6, 6)}
WAN = HEADS | IN_AND_OUT | {"attention_head_dim": 12, "patch_size": (1, 2, 2), "text_dim": 16, "freq_dim": 32}
WAN |= {"ffn_dim": 40, "cross_attn_norm": True, "rope_max_seq_len": 32}
_flux = partial(diffusers.FluxTransformer2DModel, **FLUX)
_hunyuan = partial(diffusers.HunyuanVideoTransformer3DModel, **HUNYUAN)
_sd3 = partial(diffusers.SD3Transformer2DModel, **SD3)
_qwen = partial(diffusers.QwenImageTransformer2DModel, **QWEN)
_wan = partial(diffusers.WanTransformer3DModel, **WAN)


def _flux_inputs(dtype: torch.dtype, batch: int) -> Inputs:
    image_ids = torch.cat([torch.zeros(12, 1), torch.randint(0, 5, (12, 2))], dim=1)
    return {
        "hidden_states": torch.randn(batch, 12, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 24, dtype=dtype),
        "pooled_projections": torch.randn(batch, 12, dtype=dtype),
        "timestep": torch.rand(batch, dtype=dtype),
        "img_ids": image_ids.to(dtype),
        "txt_ids": torch.zeros(7, 3, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
    }


def hunyuan_inputs(dtype: torch.dtype, batch: int, channels: int = 4, lengths: tuple[int, ...] = (5, 3)) -> Inputs:
    mask = torch.zeros(batch, 7, dtype=torch.long)
    for row, length in zip(mask, [lengths[i % len(lengths)] for i in range(batch)], strict=True):
        row[:length] = 1
    return {
        "hidden_states": torch.randn(batch, channels, 3, 4, 6, dtype=dtype),
        "timestep": torch.full((batch,), 100),
        "encoder_hidden_states": torch.randn(batch, 7, 12, dtype=dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8, dtype=dtype),
        "guidance": torch.full((batch,), 3500.0, dtype=dtype),
    }


def _sd3_inputs(dtype: torch.dtype, batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 24, dtype=dtype),
        "pooled_projections": torch.randn(batch, 12, dtype=dtype),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
    }


def _qwen_inputs(dtype: torch.dtype, batch: int) -> Inputs:
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[-1, 5:] = False
    return {
        "hidden_states": torch.randn(batch, 24, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 24, dtype=dtype),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch, dtype=dtype),
        "img_shapes": [[(1, 4, 3), (1, 4, 3)]] * batch,
    }


def _wan_inputs(dtype: torch.dtype, batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 4, 6, dtype=dtype),
        "timestep": torch.full((batch,), 100.0),
        "encoder_hidden_states": torch.randn(batch, 9, 16, dtype=dtype),
    }


def _wan_image_inputs(dtype: torch.dtype, batch: int) -> Inputs:
    return _wan_inputs(dtype, batch) | {
        "encoder_hidden_states": torch.randn(batch, 512, 16, dtype=dtype),
        "encoder_hidden_states_image": torch.randn(batch, 5, 20, dtype=dtype),
    }


def _wan_token_inputs(dtype: torch.dtype, batch: int) -> Inputs:
    return _wan_inputs(dtype, batch) | {"timestep": torch.rand(batch, 12) * 1000}


@dataclass(frozen=True)
class Tiny:
    """One model with one kind of input."""

    build: Callable[..., nn.Module]
    draw: Callable[[torch.dtype, int], Inputs]
    changes: Inputs = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return parts.randomised(self.build(**self.changes)).train().to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, batch: int = 2) -> Inputs:
        torch.manual_seed(1)
        return self.draw(dtype, batch)


TINY = {
    "flux": Tiny(_flux, _flux_inputs),
    "hunyuan": Tiny(_hunyuan, hunyuan_inputs),
    "skyreels": Tiny(_hunyuan, lambda dtype, batch: hunyuan_inputs(dtype, batch, 32, (7,)), {"in_channels": 32}),
    "hunyuan token replace": Tiny(_hunyuan, hunyuan_inputs, {"image_condition_type": "token_replace"}),
    "sd3": Tiny(_sd3, _sd3_inputs),
    "sd3.5": Tiny(_sd3, _sd3_inputs, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "qwen": Tiny(_qwen, _qwen_inputs),
    "qwen two conditions": Tiny(_qwen, _qwen_inputs, {"zero_cond_t": True}),
    "wan": Tiny(_wan, _wan_inputs),
    "wan image": Tiny(_wan, _wan_image_inputs, {"image_dim": 20, "added_kv_proj_dim": 24, "cross_attn_norm": False}),
    "wan per token": Tiny(_wan, _wan_token_inputs),
}
# One of each architecture.
FAMILIES = ("flux", "hunyuan", "sd3.5", "qwen", "wan")


def run(model: nn.Module, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and the gradient of its mean square by every parameter that has one."""
    output = model(**inputs, return_dict=False)[0]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.double().square().mean(), list(named.values()), allow_unused=True)
    return output.detach(), dict(zip(named, grads, strict=True))


def assert_same_bits(actual: tuple[Tensor, dict[str, Any]], wanted: tuple[Tensor, dict[str, Any]]) -> None:
    assert torch.equal(actual[0], wanted[0])
    assert actual[1].keys() == wanted[1].keys()
    different = [
        name
        for name, grad in wanted[1].items()
        if (grad is None) != (actual[1][name] is None) or (grad is not None and not torch.equal(actual[1][name], grad))
    ]
    assert not different, different


def doubled(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def assert_gradients_within_budget(
    actual: dict[str, Tensor | None], truth: dict[str, Tensor | None], plain: dict[str, Tensor | None]
) -> None:
    """Every parameter's gradient, with the error that plain torch makes in the whole model as the least budget."""

    def size(grad: Tensor) -> float:
        return float(grad.abs().max())

    known = {k: g for k, g in truth.items() if g is not None and k in plain}
    assert known
    errors = {k: size(plain[k].double() - g) for k, g in known.items()}
    # Biases of keys have none: what is there is rounding, in float64 too.
    least = FORMULA * max(map(size, known.values()))
    none = {k for k, g in known.items() if size(g) <= least}
    # A parameter may be right by luck in plain torch.
    relative = max(errors[k] / size(g) for k, g in known.items() if k not in none)
    noise = max((errors[k] for k in none), default=0.0)
    for key, grad in known.items():
        source = noise if key in none else relative * size(grad)
        assert_within_budget(actual[key], grad, plain[key], source=DRAW * source)
