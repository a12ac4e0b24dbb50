"""SD3Transformer2DModel (Stable Diffusion 3 and 3.5) on the block ops."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.qk_norm_rope import Stream, qk_norm_rope
from ._common import (
    Settings,
    Unprojected,
    fanout,
    feed_forward,
    gated,
    gated_norm,
    heads_of,
    modulation,
    no_arguments,
    projected,
    streams_of,
)
from ._recognise import (
    ACTIVATIONS,
    ATTENTION,
    NORMALIZATION,
    Family,
    check_feed_forward,
    check_plain_layer_norm,
    check_processor,
    check_rms_norms,
    want,
    weight_of,
)

_PROCESSOR = "JointAttnProcessor2_0"
SOURCES = {
    f"{ATTENTION}:JointTransformerBlock.forward": "df5262e875f711bb",
    "diffusers.models.attention_processor:JointAttnProcessor2_0.__call__": "f89d3e6378ae314b",
    f"{NORMALIZATION}:AdaLayerNormZero.forward": "7f6150eaa21e8087",
    f"{NORMALIZATION}:AdaLayerNormContinuous.forward": "985933e6eec7a67a",
    f"{NORMALIZATION}:SD35AdaLayerNormZeroX.forward": "76345e1c17f62234",
    f"{NORMALIZATION}:RMSNorm.forward": "e5796f5e37ef7276",
    f"{ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}


def _layers(attn: Any) -> tuple[Any, ...]:
    return attn.to_q, attn.to_k, attn.to_v


def _added_layers(attn: Any) -> tuple[Any, ...]:
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj


def _norm(settings: Settings, attn: Any, first: Stream, second: Stream | None) -> tuple[Tensor, Tensor]:
    norm, eps = ("none", 1e-6) if attn.norm_q is None else ("head_twice", attn.norm_q.eps)
    query, key = qk_norm_rope(first, second, norm=norm, eps=eps, **settings.options)
    assert key is not None
    return query, key


def _weights(*norms: Any) -> list[Tensor | None]:
    return [weight_of(norm) for norm in norms]


def _attend(settings: Settings, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the processor does: torch's attention, whatever backend the model was told to use."""
    with settings.unsaved("attention", query, key):
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2, 3).to(query.dtype)


def _self_attention(settings: Settings, attn: Any, outs: list[Tensor], gate: Tensor) -> Tensor | Unprojected:
    with settings.unsaved("norm", *outs):
        query, key, value = heads_of(attn, _layers(attn), outs)
    if attn.norm_q is not None:
        query, key = _norm(settings, attn, Stream(query, key, *_weights(attn.norm_q, attn.norm_k)), None)
    return projected(settings, attn.to_out, _attend(settings, query, key, value), gate)


def _dual_norm(
    settings: Settings, block: Any, x: Tensor, temb: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], Any]:
    """One norm with two modulations: the residual, the consumers' tokens of both attentions, and the parameters."""
    norm = block.norm1
    if settings.mode == "lossless":
        # diffusers adds both gradients before the one backward of the norm; two ops would round twice.
        out, gate, shift_mlp, scale_mlp, gate_mlp, out2, gate2 = norm(x, emb=temb)
        return x, [out] * 3, [out2] * 3, (gate, shift_mlp, scale_mlp, gate_mlp, gate2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = modulation(norm, temb, 9)
    x, *outs = fanout(settings, norm.norm, x, scale, shift, _layers(block.attn))
    x, *outs2 = fanout(settings, norm.norm, x, scale2, shift2, _layers(block.attn2))
    return x, outs, outs2, (gate, shift_mlp, scale_mlp, gate_mlp, gate2)


def _context_norm(settings: Settings, block: Any, text: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    """The text's residual, its consumers' tokens, and the parameters of what follows, which the last block has not."""
    norm = block.norm1_context
    if block.context_pre_only:
        scale, shift = norm.linear(norm.silu(temb).to(text.dtype)).chunk(2, dim=1)
        text, *outs = fanout(settings, norm.norm, text, scale, shift, _added_layers(block.attn))
        return text, outs, None
    shift, scale, *rest = modulation(norm, temb, 6)
    text, *outs = fanout(settings, norm.norm, text, scale, shift, _added_layers(block.attn))
    return text, outs, rest


def block_forward(settings: Settings) -> Callable[..., tuple[Tensor | None, Tensor]]:
    """The forward of JointTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        check_processor(self.attn, "attn", _PROCESSOR)
        no_arguments("joint_attention_kwargs", joint_attention_kwargs)
        want(self._chunk_size is None, "chunk_size", self._chunk_size, "None with an accelerated transformer")
        attn, tokens = self.attn, hidden_states.shape[1]
        outs2: Any = None
        gate2: Any = None
        if self.use_dual_attention:
            x, outs, outs2, (gate, mlp_shift, mlp_scale, mlp_gate, gate2) = _dual_norm(
                settings, self, hidden_states, temb
            )
        else:
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.norm1, temb, 6)
            x, *outs = fanout(settings, self.norm1.norm, hidden_states, scale, shift, _layers(attn))
        text, c_outs, c_parameters = _context_norm(settings, self, encoder_hidden_states, temb)

        with settings.unsaved("norm", *outs, *c_outs):
            query, key, value = heads_of(attn, _layers(attn), outs)
            c_query, c_key, c_value = heads_of(attn, _added_layers(attn), c_outs)
        query, key = _norm(
            settings,
            attn,
            Stream(query, key, *_weights(attn.norm_q, attn.norm_k)),
            Stream(c_query, c_key, *_weights(attn.norm_added_q, attn.norm_added_k)),
        )
        attended = _attend(settings, query, key, torch.cat([value, c_value], dim=1))
        attended, c_attended = streams_of(attended, tokens, attn.norm_q)
        y = projected(settings, attn.to_out, attended, gate)

        if outs2 is not None:
            x = gated(settings, x, y, gate)
            y, gate = _self_attention(settings, self.attn2, outs2, gate2), gate2
        x, out = gated_norm(settings, self.norm2, x, y, gate, mlp_scale, mlp_shift)
        x = gated(settings, x, feed_forward(settings, self.ff, out, mlp_gate), mlp_gate)
        if c_parameters is None:
            return None, x
        c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = c_parameters
        c_y = projected(settings, (attn.to_add_out,), c_attended, c_gate)
        text, c_out = gated_norm(settings, self.norm2_context, text, c_y, c_gate, c_mlp_scale, c_mlp_shift)
        text = gated(settings, text, feed_forward(settings, self.ff_context, c_out, c_mlp_gate), c_mlp_gate)
        return text, x

    return forward


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.transformer_blocks):
        where = f"transformer_blocks.{i}"
        want(type(block).__name__ == "JointTransformerBlock", where, type(block).__name__, "JointTransformerBlock")
        check_processor(block.attn, f"{where}.attn", _PROCESSOR)
        check_rms_norms(block.attn, f"{where}.attn", ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        if block.attn2 is not None:
            check_processor(block.attn2, f"{where}.attn2", _PROCESSOR)
            check_rms_norms(block.attn2, f"{where}.attn2", ("norm_q", "norm_k"))
        for name in ("norm1", "norm1_context"):
            check_plain_layer_norm(getattr(block, name).norm, f"{where}.{name}.norm")
        for name in ("norm2",) if block.context_pre_only else ("norm2", "norm2_context"):
            check_plain_layer_norm(getattr(block, name), f"{where}.{name}")
        for name in ("ff",) if block.context_pre_only else ("ff", "ff_context"):
            check_feed_forward(getattr(block, name), f"{where}.{name}")


def forwards(transformer: nn.Module, settings: Settings) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Every block with its new forward."""
    model: Any = transformer
    forward = block_forward(settings)
    yield from ((block, forward) for block in model.transformer_blocks)


FAMILY = Family("SD3Transformer2DModel", SOURCES, check, forwards)
