"""QwenImageTransformer2DModel on the block ops."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _recognise as recognise
from ._pieces import Blocks, added_layers_of, added_stream_of, clipped, layers_of, stream_of
from ._ragged import Lengths, Ragged

_MODULE = "diffusers.models.transformers.transformer_qwenimage"
SOURCES = {
    f"{_MODULE}:QwenDoubleStreamAttnProcessor2_0.__call__": "f386fc5c29fcb666",
    f"{_MODULE}:QwenImageTransformerBlock.forward": "6c3c772ab10baba8",
    f"{_MODULE}:QwenImageTransformer2DModel.forward": "9c8f430c7feb9c59",
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


def _mask(text_mask: Tensor | Ragged | None, tokens: int) -> Tensor | Ragged | None:
    if text_mask is None or isinstance(text_mask, Ragged):
        return text_mask
    image = torch.ones((len(text_mask), tokens), dtype=torch.bool, device=text_mask.device)
    return torch.cat([text_mask, image], dim=1)[:, None, None, :]


def block_forward(blocks: Blocks) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of QwenImageTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | Ragged | None,
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
            q, k, value = blocks.heads(attn, layers, outs)
            c_q, c_k, c_value = blocks.heads(attn, c_layers, c_outs)
        image_freqs, text_freqs = (None, None) if image_rotary_emb is None else image_rotary_emb
        text_stream = added_stream_of(attn, c_q, c_k, *_tables(text_freqs))
        image_stream = stream_of(attn, q, k, *_tables(image_freqs))
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


def trimmed_forward() -> Callable[..., Any]:
    """The forward of a model whose attention goes by the lengths of prompts, without a mask."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import apply_lora_scale

    lengths = Lengths(text_first=True, leading=False)

    @apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]  # diffusers has no types
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Any = None,
        img_shapes: Any = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        mask, trimmed = encoder_hidden_states_mask, None
        if mask is not None and controlnet_block_samples is None:
            trimmed = lengths(self, mask, hidden_states.shape[1])
        if trimmed is None:
            # The LoRA scale is applied already, and left out of the arguments by the decorator.
            return type(self).forward(
                self,
                hidden_states,
                encoder_hidden_states,
                mask,
                timestep,
                img_shapes,
                guidance,
                attention_kwargs,
                controlnet_block_samples,
                additional_t_cond,
                return_dict,
            )
        length, ragged = trimmed
        x, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states[:, :length]))
        timestep, index = timestep.to(x.dtype), None
        if self.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0], dim=0)
            parts = [[prod(shape) for shape in sample] for sample in img_shapes]
            rows = [[0] * first + [1] * sum(rest) for first, *rest in parts]
            index = torch.tensor(rows, device=x.device, dtype=torch.int)
        embedded = (timestep,) if guidance is None else (timestep, guidance.to(x.dtype) * 1000)
        temb = self.time_text_embed(*embedded, x, additional_t_cond)
        rotary = self.pos_embed(img_shapes, max_txt_seq_len=length, device=x.device)
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.transformer_blocks:
            arguments = (x, text, ragged, temb, rotary, attention_kwargs, index)
            text, x = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)
        temb = temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb
        x = self.proj_out(self.norm_out(x, temb))
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    return cast(Callable[..., Any], forward)


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


def forwards(transformer: nn.Module, blocks: Blocks) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Every block with its new forward, and the model's own where text is trimmed."""
    yield from recognise.forwards_of(transformer_blocks=block_forward)(transformer, blocks)
    if blocks.trim_text:
        yield transformer, trimmed_forward()


FAMILY = recognise.Family("QwenImageTransformer2DModel", SOURCES, check, forwards, trims=True)
