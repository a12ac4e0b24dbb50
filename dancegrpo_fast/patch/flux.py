"""FluxTransformer2DModel (FLUX.1) on the block ops."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _recognise as recognise
from ._pieces import (
    Blocks,
    FeedForward,
    Projected,
    added_layers_of,
    added_stream_of,
    clipped,
    joined,
    layers_of,
    modulation,
    stream_of,
)

_MODULE = "diffusers.models.transformers.transformer_flux"
SOURCES = {
    f"{_MODULE}:FluxAttnProcessor.__call__": "5c589f410686377d",
    f"{_MODULE}:FluxAttention.forward": "c28704e40c6ee038",
    f"{_MODULE}:_get_projections": "5af0cbc8d7040432",
    f"{_MODULE}:_get_fused_projections": "4ee267864002925b",
    f"{_MODULE}:FluxTransformerBlock.forward": "16f1de58a1854c4d",
    f"{_MODULE}:FluxSingleTransformerBlock.forward": "f69c2756ec0c1721",
    f"{recognise.NORMALIZATION}:AdaLayerNormZero.forward": "7f6150eaa21e8087",
    f"{recognise.NORMALIZATION}:AdaLayerNormZeroSingle.forward": "93c8a4f060a42a98",
    f"{recognise.EMBEDDINGS}:apply_rotary_emb": "0c8ce05b3e63ea69",
    f"{recognise.ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{recognise.ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}


def _layers(attn: Any, added: bool = False) -> tuple[Any, ...]:
    """The layers that give queries, keys and values of one stream."""
    if attn.fused_projections:
        return (attn.to_added_qkv if added else attn.to_qkv,)
    return added_layers_of(attn) if added else layers_of(attn)


def _projections(
    blocks: Blocks, attn: Any, layers: tuple[Any, ...], outs: Sequence[Tensor]
) -> tuple[Projected, Projected, Tensor]:
    """Queries, keys and values `[B, S, H, D]`; `outs` are the layers' aliases of their tokens."""
    if len(layers) > 1:
        return blocks.heads(attn, layers, outs)
    parts = blocks.linear(layers[0], outs[0]).chunk(3, dim=-1)
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return Projected(query), Projected(key), value


def _tables(rotary: tuple[Tensor, Tensor] | None, start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
    if rotary is None:
        return None, None
    # The tables [S, D] hold every angle twice, and meet float32 queries.
    cos, sin = (table[start:stop, ::2].float() for table in rotary)
    return cos, sin


def double_block(blocks: Blocks) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of FluxTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        recognise.check_processor(self.attn, "attn", "FluxAttnProcessor")
        options = dict(joint_attention_kwargs or {})
        mask = options.pop("attention_mask", None)
        recognise.no_arguments("joint_attention_kwargs", options)
        attn, text_length = self.attn, encoder_hidden_states.shape[1]

        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.norm1, temb, 6)
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = modulation(self.norm1_context, temb, 6)
        layers, c_layers = _layers(attn), _layers(attn, added=True)
        x, *outs = blocks.fanout(self.norm1.norm, hidden_states, scale, shift, layers)
        text, *c_outs = blocks.fanout(self.norm1_context.norm, encoder_hidden_states, c_scale, c_shift, c_layers)

        with blocks.unsaved("norm", *outs, *c_outs):
            q, k, value = _projections(blocks, attn, layers, outs)
            c_q, c_k, c_value = _projections(blocks, attn, c_layers, c_outs)
        tables = _tables(image_rotary_emb, text_length, text_length + x.shape[1])
        text_stream = added_stream_of(attn, c_q, c_k, *_tables(image_rotary_emb, 0, text_length))
        query, key = blocks.norm_rope(attn, text_stream, stream_of(attn, q, k, *tables), norm="head")
        attended = blocks.attend(attn, query, key, torch.cat([c_value, value], dim=1), mask)
        c_attended, attended = attended.split_with_sizes([text_length, x.shape[1]], dim=1)
        y = blocks.projected(attn.to_out, attended.contiguous(), gate)
        c_y = blocks.projected((attn.to_add_out,), c_attended.contiguous(), c_gate)

        x, out = blocks.gated_norm(self.norm2, x, y, gate, mlp_scale, mlp_shift)
        x = blocks.gated(x, blocks.feed_forward(self.ff, out, mlp_gate), mlp_gate)
        text, c_out = blocks.gated_norm(self.norm2_context, text, c_y, c_gate, c_mlp_scale, c_mlp_shift)
        text = blocks.gated(text, blocks.feed_forward(self.ff_context, c_out, c_mlp_gate), c_mlp_gate)
        return clipped(text), x

    return forward


def single_block(blocks: Blocks) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of FluxSingleTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        recognise.check_processor(self.attn, "attn", "FluxAttnProcessor")
        options = dict(joint_attention_kwargs or {})
        mask = options.pop("attention_mask", None)
        recognise.no_arguments("joint_attention_kwargs", options)
        attn, text_length = self.attn, encoder_hidden_states.shape[1]
        x = joined(encoder_hidden_states, hidden_states)

        layers = _layers(attn)
        shift, scale, gate = modulation(self.norm, temb, 3)
        x, mlp_out, *outs = blocks.fanout(self.norm.norm, x, scale, shift, (self.proj_mlp, *layers))
        mlp = FeedForward(blocks, (self.proj_mlp, self.proj_out), mlp_out, gate)
        with blocks.unsaved("norm", mlp_out):
            hidden = mlp.hidden(mlp_out)
            q, k, value = _projections(blocks, attn, layers, outs)
        tables = _tables(image_rotary_emb, 0, x.shape[1])
        query, key = blocks.norm_rope(attn, stream_of(attn, q, k, *tables), norm="head")
        attended = blocks.attend(attn, query, key, value, mask)
        x = clipped(blocks.gated(x, mlp.project(hidden, attended), gate))
        return x[:, :text_length], x[:, text_length:]

    return forward


def _check_attention(attn: Any, where: str, streams: int) -> None:
    recognise.check_processor(attn, where, "FluxAttnProcessor")
    norms = ["norm_q", "norm_k", *(["norm_added_q", "norm_added_k"] if streams == 2 else [])]
    for name in norms:
        norm = getattr(attn, name)
        recognise.want(type(norm) is nn.RMSNorm, f"{where}.{name}", norm, "an nn.RMSNorm")
        recognise.want(
            norm.eps == attn.norm_q.eps or norm.eps is None, f"{where}.{name}.eps", norm.eps, "that of norm_q"
        )


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.transformer_blocks):
        where = f"transformer_blocks.{i}"
        recognise.check_block(block, where, "FluxTransformerBlock")
        _check_attention(block.attn, f"{where}.attn", 2)
        recognise.check_plain_layer_norms(block, where, "norm1.norm", "norm1_context.norm", "norm2", "norm2_context")
        recognise.check_feed_forwards(block, where, "ff", "ff_context")
    for i, block in enumerate(model.single_transformer_blocks):
        where = f"single_transformer_blocks.{i}"
        recognise.check_block(block, where, "FluxSingleTransformerBlock")
        _check_attention(block.attn, f"{where}.attn", 1)
        recognise.check_plain_layer_norms(block, where, "norm.norm")


FAMILY = recognise.Family(
    "FluxTransformer2DModel",
    SOURCES,
    check,
    recognise.forwards_of(transformer_blocks=double_block, single_transformer_blocks=single_block),
)
