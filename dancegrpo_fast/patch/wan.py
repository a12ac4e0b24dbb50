"""WanTransformer3DModel (Wan 2.1 and 2.2) on the block ops."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.qk_norm_rope import Stream, qk_norm_rope
from . import _recognise as recognise
from ._pieces import Blocks, Projected, Unprojected, affine_of, layers_of, stream_of, weight_of

_MODULE = "diffusers.models.transformers.transformer_wan"
# The text encoder's length, which the processor too takes for granted when image tokens come before the text's.
_TEXT_TOKENS = 512
SOURCES = {
    f"{_MODULE}:WanAttnProcessor.__call__": "fee82da82dba3709",
    f"{_MODULE}:WanAttention.forward": "bb1261845409596f",
    f"{_MODULE}:_get_qkv_projections": "4ba6f764ab2f997a",
    f"{_MODULE}:_get_added_kv_projections": "706fab7ddb9ace9b",
    f"{_MODULE}:WanTransformerBlock.forward": "e2ce4abea902a784",
    f"{recognise.NORMALIZATION}:FP32LayerNorm.forward": "89fd93099762215b",
    f"{recognise.ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{recognise.ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}


def _heads(attn: Any, x: Tensor) -> Tensor:
    return cast(Tensor, x.unflatten(2, (attn.heads, -1)))


def _normed(blocks: Blocks, attn: Any, norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm over all heads of queries, or of keys, that are not rotated."""
    stream = Stream(_heads(attn, x), q_weight=weight_of(norm))
    return qk_norm_rope(stream, norm="token", eps=_eps(norm, x), **blocks.options)[0]


def _eps(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def _projected(blocks: Blocks, attn: Any, layer: str, fused: str, outs: list[Tensor]) -> list[Tensor]:
    if attn.fused_projections:
        return list(blocks.linear(getattr(attn, fused), outs[0]).chunk(len(layer.split()), dim=-1))
    return [blocks.linear(getattr(attn, name), out) for name, out in zip(layer.split(), outs, strict=True)]


def _self_attention(
    blocks: Blocks, attn: Any, outs: list[Tensor], rotary: tuple[Tensor, Tensor] | None, gate: Tensor
) -> Projected | Unprojected:
    with blocks.unsaved("norm", *outs):
        query, key, value = _projected(blocks, attn, "to_q to_k to_v", "to_qkv", outs)
    # Tables [1, S, 1, D] hold every angle twice.
    tables = (None, None) if rotary is None else (rotary[0][0, :, 0, 0::2], rotary[1][0, :, 0, 1::2])
    joint_query, joint_key = qk_norm_rope(
        stream_of(attn, Projected(_heads(attn, query)), Projected(_heads(attn, key)), *tables),
        norm="token",
        eps=_eps(attn.norm_q, query),
        **blocks.options,
    )
    assert joint_key is not None
    out = blocks.attend(attn, joint_query, joint_key, _heads(attn, value), None)
    return blocks.projected(attn.to_out, out, gate)


def _cross_attention(blocks: Blocks, attn: Any, x: Tensor, text: Tensor) -> Tensor:
    image = None
    if attn.add_k_proj is not None:
        image, text = text[:, :-_TEXT_TOKENS], text[:, -_TEXT_TOKENS:]
    with blocks.unsaved("norm", x):
        query = blocks.linear(attn.to_q, x)
    key, value = _projected(blocks, attn, "to_k to_v", "to_kv", [text, text])
    query = _normed(blocks, attn, attn.norm_q, query)
    key = _normed(blocks, attn, attn.norm_k, key)
    from_image = None
    if image is not None:
        image_key, image_value = _projected(blocks, attn, "add_k_proj add_v_proj", "to_added_kv", [image, image])
        image_key = _normed(blocks, attn, attn.norm_added_k, image_key)
        from_image = blocks.attend(attn, query, image_key, _heads(attn, image_value), None, parallel=False)
    out = blocks.attend(attn, query, key, _heads(attn, value), None, parallel=False)
    if from_image is not None:
        out = out + from_image
    return cast(Tensor, attn.to_out[1](blocks.linear(attn.to_out[0], out)))


def block_forward(blocks: Blocks) -> Callable[..., Tensor]:
    """The forward of WanTransformerBlock, whose norms and modulations are in float32."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        recognise.check_processor(self.attn1, "attn1", "WanAttnProcessor")
        recognise.check_processor(self.attn2, "attn2", "WanAttnProcessor")
        per_token = temb.ndim == 4
        table = self.scale_shift_table.unsqueeze(0) if per_token else self.scale_shift_table
        parts = (table + temb.float()).chunk(6, dim=2 if per_token else 1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (p.squeeze(2) if per_token else p for p in parts)
        in_float = {"norm_dtype": torch.float32}

        attn = self.attn1
        layers = (attn.to_qkv,) if attn.fused_projections else layers_of(attn)
        x, *outs = blocks.fanout(self.norm1, hidden_states, scale, shift, layers, **in_float)
        y = _self_attention(blocks, attn, outs, rotary_emb, gate)
        if isinstance(self.norm2, nn.LayerNorm):
            affine = dict(zip(("weight", "bias"), affine_of(self.norm2), strict=True))
            x, out = blocks.gated_norm(self.norm2, x, y, gate, None, None, **affine, **in_float)
        else:
            x = blocks.gated(x, y, gate)
            # A node of its own where eager casts: gradients of what reads it are added before the residual's.
            out = x if x.dtype == torch.float32 else x.view_as(x)
        x = x + _cross_attention(blocks, self.attn2, out, encoder_hidden_states)

        x, out = blocks.fanout(self.norm3, x, mlp_scale, mlp_shift, (self.ffn.net[0].proj,), **in_float)
        return blocks.gated(x, blocks.feed_forward(self.ffn, out, mlp_gate), mlp_gate)

    return forward


def _check_norm(module: nn.Module, where: str, affine: bool) -> None:
    fits = type(module).__name__ == "FP32LayerNorm" and cast(Any, module).elementwise_affine == affine
    recognise.want(fits, where, module, f"an FP32LayerNorm {'with' if affine else 'without'} weights")


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.blocks):
        where = f"blocks.{i}"
        recognise.check_block(block, where, "WanTransformerBlock")
        for name in ("attn1", "attn2"):
            attn = getattr(block, name)
            recognise.check_processor(attn, f"{where}.{name}", "WanAttnProcessor")
            norms = ["norm_q", "norm_k", *(["norm_added_k"] if attn.add_k_proj is not None else [])]
            for norm in norms:
                found = getattr(attn, norm)
                recognise.want(type(found) is nn.RMSNorm, f"{where}.{name}.{norm}", found, "an nn.RMSNorm")
        recognise.want(
            block.attn1.norm_q.eps == block.attn1.norm_k.eps, f"{where}.attn1.norm_k", "another eps", "norm_q's"
        )
        _check_norm(block.norm1, f"{where}.norm1", False)
        _check_norm(block.norm3, f"{where}.norm3", False)
        if not isinstance(block.norm2, nn.Identity):
            _check_norm(block.norm2, f"{where}.norm2", True)
        recognise.check_feed_forwards(block, where, "ffn")


FAMILY = recognise.Family("WanTransformer3DModel", SOURCES, check, recognise.forwards_of(blocks=block_forward))
