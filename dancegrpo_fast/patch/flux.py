"""FluxTransformer2DModel (FLUX.1) on the block ops."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.qk_norm_rope import Stream, qk_norm_rope
from ._common import (
    FeedForward,
    Settings,
    attend,
    clipped,
    fanout,
    feed_forward,
    gated,
    gated_norm,
    joined,
    modulation,
    no_arguments,
    projected,
)
from ._recognise import (
    ACTIVATIONS,
    ATTENTION,
    EMBEDDINGS,
    NORMALIZATION,
    Family,
    check_feed_forward,
    check_plain_layer_norm,
    check_processor,
    want,
    weight_of,
)

_MODULE = "diffusers.models.transformers.transformer_flux"
SOURCES = {
    f"{_MODULE}:FluxAttnProcessor.__call__": "5c589f410686377d",
    f"{_MODULE}:FluxAttention.forward": "c28704e40c6ee038",
    f"{_MODULE}:_get_projections": "5af0cbc8d7040432",
    f"{_MODULE}:_get_fused_projections": "4ee267864002925b",
    f"{_MODULE}:FluxTransformerBlock.forward": "16f1de58a1854c4d",
    f"{_MODULE}:FluxSingleTransformerBlock.forward": "f69c2756ec0c1721",
    f"{NORMALIZATION}:AdaLayerNormZero.forward": "7f6150eaa21e8087",
    f"{NORMALIZATION}:AdaLayerNormZeroSingle.forward": "93c8a4f060a42a98",
    f"{EMBEDDINGS}:apply_rotary_emb": "0c8ce05b3e63ea69",
    f"{ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}


def _layers(attn: Any, added: bool = False) -> tuple[Any, ...]:
    """The layers that give queries, keys and values of one stream."""
    if attn.fused_projections:
        return (attn.to_added_qkv if added else attn.to_qkv,)
    return (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if added else (attn.to_q, attn.to_k, attn.to_v)


def _projections(attn: Any, layers: tuple[Any, ...], outs: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, S, H, D]`; `outs` are the layers' aliases of their tokens."""
    parts = [layer(out) for layer, out in zip(layers, outs, strict=True)]
    if len(parts) == 1:
        parts = parts[0].chunk(3, dim=-1)
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return query, key, value


def _norm_rope(settings: Settings, attn: Any, first: Stream, second: Stream | None = None) -> tuple[Tensor, Tensor]:
    eps = attn.norm_q.eps
    query, key = qk_norm_rope(first, second, norm="head", eps=eps, **settings.options)
    assert key is not None
    return query, key


def _tables(rotary: tuple[Tensor, Tensor] | None, start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
    if rotary is None:
        return None, None
    # The tables [S, D] hold every angle twice, and meet float32 queries.
    cos, sin = (table[start:stop, ::2].float() for table in rotary)
    return cos, sin


def double_block(settings: Settings) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of FluxTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_processor(self.attn, "attn", "FluxAttnProcessor")
        options = dict(joint_attention_kwargs or {})
        mask = options.pop("attention_mask", None)
        no_arguments("joint_attention_kwargs", options)
        attn, text_length = self.attn, encoder_hidden_states.shape[1]

        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.norm1, temb, 6)
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = modulation(self.norm1_context, temb, 6)
        layers, c_layers = _layers(attn), _layers(attn, added=True)
        x, *outs = fanout(settings, self.norm1.norm, hidden_states, scale, shift, layers)
        text, *c_outs = fanout(settings, self.norm1_context.norm, encoder_hidden_states, c_scale, c_shift, c_layers)

        with settings.unsaved("norm", *outs, *c_outs):
            query, key, value = _projections(attn, layers, outs)
            c_query, c_key, c_value = _projections(attn, c_layers, c_outs)
        tables = _tables(image_rotary_emb, text_length, text_length + x.shape[1])
        query, key = _norm_rope(
            settings,
            attn,
            Stream(
                c_query,
                c_key,
                weight_of(attn.norm_added_q),
                weight_of(attn.norm_added_k),
                *_tables(image_rotary_emb, 0, text_length),
            ),
            Stream(query, key, weight_of(attn.norm_q), weight_of(attn.norm_k), *tables),
        )
        attended = attend(settings, attn, query, key, torch.cat([c_value, value], dim=1), mask)
        c_attended, attended = attended.split_with_sizes([text_length, x.shape[1]], dim=1)
        y = projected(settings, attn.to_out, attended.contiguous(), gate)
        c_y = projected(settings, (attn.to_add_out,), c_attended.contiguous(), c_gate)

        x, out = gated_norm(settings, self.norm2, x, y, gate, mlp_scale, mlp_shift)
        x = gated(settings, x, feed_forward(settings, self.ff, out, mlp_gate), mlp_gate)
        text, c_out = gated_norm(settings, self.norm2_context, text, c_y, c_gate, c_mlp_scale, c_mlp_shift)
        text = gated(settings, text, feed_forward(settings, self.ff_context, c_out, c_mlp_gate), c_mlp_gate)
        return clipped(text), x

    return forward


def single_block(settings: Settings) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of FluxSingleTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_processor(self.attn, "attn", "FluxAttnProcessor")
        options = dict(joint_attention_kwargs or {})
        mask = options.pop("attention_mask", None)
        no_arguments("joint_attention_kwargs", options)
        attn, text_length = self.attn, encoder_hidden_states.shape[1]
        x = joined(encoder_hidden_states, hidden_states)

        layers = _layers(attn)
        shift, scale, gate = modulation(self.norm, temb, 3)
        x, mlp_out, *outs = fanout(settings, self.norm.norm, x, scale, shift, (self.proj_mlp, *layers))
        mlp = FeedForward(settings, (self.proj_mlp, self.proj_out), mlp_out, gate)
        with settings.unsaved("norm", mlp_out):
            hidden = mlp.hidden(mlp_out)
            query, key, value = _projections(attn, layers, outs)
        tables = _tables(image_rotary_emb, 0, x.shape[1])
        stream = Stream(query, key, weight_of(attn.norm_q), weight_of(attn.norm_k), *tables)
        query, key = _norm_rope(settings, attn, stream)
        attended = attend(settings, attn, query, key, value, mask)
        x = clipped(gated(settings, x, mlp.project(hidden, attended), gate))
        return x[:, :text_length], x[:, text_length:]

    return forward


def _check_attention(attn: Any, where: str, streams: int) -> None:
    check_processor(attn, where, "FluxAttnProcessor")
    norms = ["norm_q", "norm_k", *(["norm_added_q", "norm_added_k"] if streams == 2 else [])]
    for name in norms:
        norm = getattr(attn, name)
        want(type(norm) is nn.RMSNorm, f"{where}.{name}", norm, "an nn.RMSNorm")
        want(norm.eps == attn.norm_q.eps or norm.eps is None, f"{where}.{name}.eps", norm.eps, "that of norm_q")


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.transformer_blocks):
        where = f"transformer_blocks.{i}"
        want(type(block).__name__ == "FluxTransformerBlock", where, type(block).__name__, "FluxTransformerBlock")
        _check_attention(block.attn, f"{where}.attn", 2)
        for name in ("norm1", "norm1_context"):
            check_plain_layer_norm(getattr(block, name).norm, f"{where}.{name}.norm")
        for name in ("norm2", "norm2_context"):
            check_plain_layer_norm(getattr(block, name), f"{where}.{name}")
        for name in ("ff", "ff_context"):
            check_feed_forward(getattr(block, name), f"{where}.{name}")
    for i, block in enumerate(model.single_transformer_blocks):
        where = f"single_transformer_blocks.{i}"
        kind = type(block).__name__
        want(kind == "FluxSingleTransformerBlock", where, kind, "FluxSingleTransformerBlock")
        _check_attention(block.attn, f"{where}.attn", 1)
        check_plain_layer_norm(block.norm.norm, f"{where}.norm.norm")


def forwards(transformer: nn.Module, settings: Settings) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Every block with its new forward."""
    model: Any = transformer
    double, single = double_block(settings), single_block(settings)
    yield from ((block, double) for block in model.transformer_blocks)
    yield from ((block, single) for block in model.single_transformer_blocks)


FAMILY = Family("FluxTransformer2DModel", SOURCES, check, forwards)
