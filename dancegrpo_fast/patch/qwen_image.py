"""QwenImageTransformer2DModel on the block ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _recognise as recognise
from ._pieces import Blocks, added_layers_of, added_stream_of, clipped, layers_of, stream_of

_MODULE = "diffusers.models.transformers.transformer_qwenimage"
SOURCES = {
    f"{_MODULE}:QwenDoubleStreamAttnProcessor2_0.__call__": "f386fc5c29fcb666",
    f"{_MODULE}:QwenImageTransformerBlock.forward": "6c3c772ab10baba8",
    f"{_MODULE}:QwenImageTransformerBlock._modulate": "e81a9f67fc18c02d",
    f"{_MODULE}:apply_rotary_emb_qwen": "a25dd2eba1c395b4",
    f"{recognise.NORMALIZATION}:RMSNorm.forward": "e5796f5e37ef7276",
    f"{recognise.ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{recognise.ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}


def _rows(parameters: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """Shift, scale and gate of a sample, or of each token where `index` says which of two conditions it has."""
    parts = parameters.chunk(3, dim=-1)
    if index is None:
        return parts
    first, second = zip(*(part.chunk(2) for part in parts), strict=True)
    return tuple(
        torch.where(index.unsqueeze(-1) == 0, a.unsqueeze(1), b.unsqueeze(1))
        for a, b in zip(first, second, strict=True)
    )


def _tables(freqs: Tensor | None) -> tuple[Tensor, ...]:
    """Cosines and sines, one a pair, from complex numbers of length 1."""
    return () if freqs is None else (freqs.real, freqs.imag)


def _mask(text_mask: Tensor | None, tokens: int) -> Tensor | None:
    if text_mask is None:
        return None
    image = torch.ones((len(text_mask), tokens), dtype=torch.bool, device=text_mask.device)
    return torch.cat([text_mask, image], dim=1)[:, None, None, :]


def block_forward(blocks: Blocks) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of QwenImageTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        recognise.check_processor(self.attn, "attn", "QwenDoubleStreamAttnProcessor2_0")
        recognise.no_arguments("joint_attention_kwargs", joint_attention_kwargs)
        attn = self.attn
        image_parameters = self.img_mod(temb)
        text_parameters = self.txt_mod(temb.chunk(2)[0] if self.zero_cond_t else temb)
        first, second = image_parameters.chunk(2, dim=-1)
        shift, scale, gate = _rows(first, modulate_index)
        mlp_shift, mlp_scale, mlp_gate = _rows(second, modulate_index)
        first, second = text_parameters.chunk(2, dim=-1)
        c_shift, c_scale, c_gate = _rows(first, None)
        c_mlp_shift, c_mlp_scale, c_mlp_gate = _rows(second, None)

        layers, c_layers = layers_of(attn), added_layers_of(attn)
        x, *outs = blocks.fanout(self.img_norm1, hidden_states, scale, shift, layers)
        text, *c_outs = blocks.fanout(self.txt_norm1, encoder_hidden_states, c_scale, c_shift, c_layers)
        with blocks.unsaved("norm", *outs, *c_outs):
            query, key, value = blocks.heads(attn, layers, outs)
            c_query, c_key, c_value = blocks.heads(attn, c_layers, c_outs)
        image_freqs, text_freqs = (None, None) if image_rotary_emb is None else image_rotary_emb
        text_stream = added_stream_of(attn, c_query, c_key, *_tables(text_freqs))
        image_stream = stream_of(attn, query, key, *_tables(image_freqs))
        query, key = blocks.norm_rope(attn, text_stream, image_stream, rope_gradient="once")
        mask = _mask(encoder_hidden_states_mask, x.shape[1])
        attended = blocks.attend(attn, query, key, torch.cat([c_value, value], dim=1), mask)
        c_attended, attended = attended.split_with_sizes([text.shape[1], x.shape[1]], dim=1)
        y = blocks.projected(attn.to_out, attended.contiguous(), gate)
        c_y = blocks.projected((attn.to_add_out,), c_attended.contiguous(), c_gate)

        x, out = blocks.gated_norm(self.img_norm2, x, y, gate, mlp_scale, mlp_shift)
        x = blocks.gated(x, blocks.feed_forward(self.img_mlp, out, mlp_gate), mlp_gate)
        text, c_out = blocks.gated_norm(self.txt_norm2, text, c_y, c_gate, c_mlp_scale, c_mlp_shift)
        text = blocks.gated(text, blocks.feed_forward(self.txt_mlp, c_out, c_mlp_gate), c_mlp_gate)
        return clipped(text), clipped(x)

    return forward


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.transformer_blocks):
        where = f"transformer_blocks.{i}"
        recognise.check_block(block, where, "QwenImageTransformerBlock")
        recognise.check_processor(block.attn, f"{where}.attn", "QwenDoubleStreamAttnProcessor2_0")
        recognise.check_rms_norms(block.attn, f"{where}.attn", ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        recognise.check_plain_layer_norms(block, where, "img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
        recognise.check_feed_forwards(block, where, "img_mlp", "txt_mlp")


FAMILY = recognise.Family(
    "QwenImageTransformer2DModel", SOURCES, check, recognise.forwards_of(transformer_blocks=block_forward)
)
