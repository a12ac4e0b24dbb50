"""One block of each real model at its real width: the bits of diffusers' own, and the budget of float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf

from ..release import release_but
from ..tolerances import assert_within_budget
from .models import diffusers

BF16, F32 = torch.bfloat16, torch.float32
TEXT, GRID = 9, (2, 4, 3)
TOKENS = GRID[0] * GRID[1] * GRID[2]


def _rotary(dim: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens, dtype=F32)[:, None] / 10 ** torch.linspace(0, 4, dim // 2, dtype=F32)
    return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


def _flux(single: bool) -> tuple[Any, Any]:
    layers = {"num_layers": int(not single), "num_single_layers": int(single)}
    model = diffusers.FluxTransformer2DModel(**layers, joint_attention_dim=8, pooled_projection_dim=8)
    block = (model.single_transformer_blocks if single else model.transformer_blocks)[0]
    return model, lambda x, text, temb: block(x, text, temb, image_rotary_emb=_rotary(128, TEXT + TOKENS))


def _hunyuan(single: bool) -> tuple[Any, Any]:
    layers = {"num_layers": int(not single), "num_single_layers": int(single), "num_refiner_layers": 0}
    model = diffusers.HunyuanVideoTransformer3DModel(**layers, text_embed_dim=8, pooled_projection_dim=8)
    block = (model.single_transformer_blocks if single else model.transformer_blocks)[0]
    return model, lambda x, text, temb: block(x, text, temb, None, _rotary(128))


def _sd3() -> tuple[Any, Any]:
    # Two layers, as the last has no text behind its attention.
    sizes = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 38, "caption_projection_dim": 38 * 64}
    small = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "sample_size": 8, "pos_embed_max_size": 8}
    model = diffusers.SD3Transformer2DModel(**sizes, **small, qk_norm="rms_norm")
    return model, lambda x, text, temb: model.transformer_blocks[0](x, text, temb)


def _qwen() -> tuple[Any, Any]:
    model = diffusers.QwenImageTransformer2DModel(num_layers=1, joint_attention_dim=8)

    def call(x: Tensor, text: Tensor, temb: Tensor) -> Any:
        rotary = model.pos_embed([[GRID]], max_txt_seq_len=TEXT, device=x.device)
        return model.transformer_blocks[0](x, text, None, temb, rotary)

    return model, call


def _wan() -> tuple[Any, Any]:
    # Of the 1.3 B model.
    model = diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=1, text_dim=8)
    cos, sin = (t[None, :, None] for t in _rotary(128))
    return model, lambda x, text, temb: model.blocks[0](x, text, temb.unflatten(1, (6, -1)), (cos, sin))


BLOCKS = {
    "flux double": (lambda: _flux(False), 3072, 1),
    "flux single": (lambda: _flux(True), 3072, 1),
    "hunyuan double": (lambda: _hunyuan(False), 3072, 1),
    "hunyuan single": (lambda: _hunyuan(True), 3072, 1),
    "sd3.5": (_sd3, 38 * 64, 1),
    "qwen": (_qwen, 3072, 1),
    "wan": (_wan, 12 * 128, 6),
}


@pytest.fixture(autouse=True)
def in_bfloat16() -> Any:
    """Models are made in bfloat16: in float32 they would fill the memory of a small machine."""
    torch.set_default_dtype(BF16)
    yield
    torch.set_default_dtype(F32)


def _make(name: str) -> tuple[Any, Any, list[Tensor]]:
    build, channels, chunks = BLOCKS[name]
    torch.manual_seed(0)
    model, call = build()
    torch.manual_seed(1)
    shapes = ((1, TOKENS, channels), (1, TEXT, channels), (1, chunks * channels))
    return model, call, [torch.randn(shape, dtype=BF16) for shape in shapes]


def _run(call: Any, inputs: list[Tensor], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    found = call(*inputs)
    outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
    torch.manual_seed(2)
    seeds = [torch.randn(o.shape, dtype=F32).to(o.dtype) for o in outputs]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))


@pytest.mark.parametrize("name", release_but(("wan",), BLOCKS))
def test_lossless_and_fast(name: str) -> None:
    model, call, inputs = _make(name)
    inputs = [t.requires_grad_() for t in inputs]
    leaves = [*inputs, *(p for p in model.parameters())]
    outputs, grads = _run(call, inputs, leaves)
    undo = dgf.accelerate(model, "lossless", recompute="all")
    found, found_grads = _run(call, inputs, leaves)
    for actual, wanted in zip(found + found_grads, outputs + grads, strict=True):
        assert (actual is None) == (wanted is None) and (wanted is None or torch.equal(actual, wanted))
    undo()

    model.requires_grad_(False)
    plain, plain_grads = outputs, grads[:3]
    undo = dgf.accelerate(model, "fast")
    fast, fast_grads = _run(call, inputs, inputs)
    del leaves, grads, outputs, found, found_grads
    undo()
    model.double()
    doubled = [t.detach().double().requires_grad_() for t in inputs]
    truth, truth_grads = _run(call, doubled, doubled)
    for actual, right, like in zip(fast + fast_grads, truth + truth_grads, plain + plain_grads, strict=True):
        if right is not None:
            assert_within_budget(actual, right, like)
