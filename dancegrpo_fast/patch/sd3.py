"""SD3Transformer2DModel (Stable Diffusion 3 and 3.5) on the block ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _recognise as recognise
from ._pieces import (
    Blocks,
    Projected,
    Unprojected,
    added_layers_of,
    added_stream_of,
    layers_of,
    modulation,
    stream_of,
    streams_of,
)

_PROCESSOR = "JointAttnProcessor2_0"
SOURCES = {
    f"{recognise.ATTENTION}:JointTransformerBlock.forward": "df5262e875f711bb",
    "diffusers.models.attention_processor:JointAttnProcessor2_0.__call__": "f89d3e6378ae314b",
    f"{recognise.NORMALIZATION}:AdaLayerNormZero.forward": "7f6150eaa21e8087",
    f"{recognise.NORMALIZATION}:AdaLayerNormContinuous.forward": "985933e6eec7a67a",
    f"{recognise.NORMALIZATION}:SD35AdaLayerNormZeroX.forward": "76345e1c17f62234",
    f"{recognise.NORMALIZATION}:RMSNorm.forward": "e5796f5e37ef7276",
    f"{recognise.ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{recognise.ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}


def _attend(blocks: Blocks, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the processor does: torch's attention, whatever backend the model was told to use."""
    with blocks.unsaved("attention", query, key):
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2, 3).to(query.dtype)


def _self_attention(blocks: Blocks, attn: Any, outs: list[Tensor], gate: Tensor) -> Projected | Unprojected:
    normed = attn.norm_q is not None
    with blocks.unsaved("norm", *outs):
        projected = blocks.heads(attn, layers_of(attn), outs, handed=normed)
    query, key, value = projected[0].out, projected[1].out, projected[2]
    if normed:
        query, key = blocks.norm_rope(attn, stream_of(attn, *projected[:2]))
    return blocks.projected(attn.to_out, _attend(blocks, query, key, value), gate)


def _dual_norm(blocks: Blocks, block: Any, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Any]:
    """One norm with two modulations: the residual, the consumers' tokens of both attentions, and the parameters."""
    norm = block.norm1
    if blocks.mode == "lossless":
        # diffusers adds both gradients before the one backward of the norm; two ops would round twice.
        out, gate, shift_mlp, scale_mlp, gate_mlp, out2, gate2 = norm(x, emb=temb)
        return x, [out] * 3, [out2] * 3, (gate, shift_mlp, scale_mlp, gate_mlp, gate2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = modulation(norm, temb, 9)
    x, *outs = blocks.fanout(norm.norm, x, scale, shift, layers_of(block.attn))
    x, *outs2 = blocks.fanout(norm.norm, x, scale2, shift2, layers_of(block.attn2))
    return x, outs, outs2, (gate, shift_mlp, scale_mlp, gate_mlp, gate2)


def _context_norm(blocks: Blocks, block: Any, text: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    """The text's residual, its consumers' tokens, and the parameters of what follows, which the last block has not."""
    norm = block.norm1_context
    if block.context_pre_only:
        scale, shift = norm.linear(norm.silu(temb).to(text.dtype)).chunk(2, dim=1)
        text, *outs = blocks.fanout(norm.norm, text, scale, shift, added_layers_of(block.attn))
        return text, outs, None
    shift, scale, *rest = modulation(norm, temb, 6)
    text, *outs = blocks.fanout(norm.norm, text, scale, shift, added_layers_of(block.attn))
    return text, outs, rest


def block_forward(blocks: Blocks) -> Callable[..., tuple[Tensor | None, Tensor]]:
    """The forward of JointTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        recognise.check_processor(self.attn, "attn", _PROCESSOR)
        recognise.no_arguments("joint_attention_kwargs", joint_attention_kwargs)
        recognise.want(self._chunk_size is None, "chunk_size", self._chunk_size, "None with an accelerated transformer")
        attn, tokens = self.attn, hidden_states.shape[1]
        outs2: Any = None
        gate2: Any = None
        if self.use_dual_attention:
            x, outs, outs2, (gate, mlp_shift, mlp_scale, mlp_gate, gate2) = _dual_norm(
                blocks, self, hidden_states, temb
            )
        else:
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.norm1, temb, 6)
            x, *outs = blocks.fanout(self.norm1.norm, hidden_states, scale, shift, layers_of(attn))
        text, c_outs, c_parameters = _context_norm(blocks, self, encoder_hidden_states, temb)

        with blocks.unsaved("norm", *outs, *c_outs):
            q, k, value = blocks.heads(attn, layers_of(attn), outs)
            c_q, c_k, c_value = blocks.heads(attn, added_layers_of(attn), c_outs)
        text_stream = added_stream_of(attn, c_q, c_k)
        query, key = blocks.norm_rope(attn, stream_of(attn, q, k), text_stream)
        attended = _attend(blocks, query, key, torch.cat([value, c_value], dim=1))
        attended, c_attended = streams_of(attended, tokens, attn.norm_q)
        y = blocks.projected(attn.to_out, attended, gate)

        if outs2 is not None:
            x = blocks.gated(x, y, gate)
            y, gate = _self_attention(blocks, self.attn2, outs2, gate2), gate2
        x, out = blocks.gated_norm(self.norm2, x, y, gate, mlp_scale, mlp_shift)
        x = blocks.gated(x, blocks.feed_forward(self.ff, out, mlp_gate), mlp_gate)
        if c_parameters is None:
            return None, x
        c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = c_parameters
        c_y = blocks.projected((attn.to_add_out,), c_attended, c_gate)
        text, c_out = blocks.gated_norm(self.norm2_context, text, c_y, c_gate, c_mlp_scale, c_mlp_shift)
        text = blocks.gated(text, blocks.feed_forward(self.ff_context, c_out, c_mlp_gate), c_mlp_gate)
        return text, x

    return forward


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.transformer_blocks):
        where = f"transformer_blocks.{i}"
        recognise.check_block(block, where, "JointTransformerBlock")
        recognise.check_processor(block.attn, f"{where}.attn", _PROCESSOR)
        recognise.check_rms_norms(block.attn, f"{where}.attn", ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        if block.attn2 is not None:
            recognise.check_processor(block.attn2, f"{where}.attn2", _PROCESSOR)
            recognise.check_rms_norms(block.attn2, f"{where}.attn2", ("norm_q", "norm_k"))
        recognise.check_plain_layer_norms(block, where, "norm1.norm", "norm1_context.norm", "norm2")
        recognise.check_feed_forwards(block, where, "ff")
        if not block.context_pre_only:
            recognise.check_plain_layer_norms(block, where, "norm2_context")
            recognise.check_feed_forwards(block, where, "ff_context")


FAMILY = recognise.Family(
    "SD3Transformer2DModel", SOURCES, check, recognise.forwards_of(transformer_blocks=block_forward)
)
