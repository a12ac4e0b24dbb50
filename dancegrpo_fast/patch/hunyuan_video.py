"""HunyuanVideoTransformer3DModel on the block ops: text to video, SkyReels' 32 channels, and image to video with its
first frame's tokens modulated apart (token replace)."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _recognise as recognise
from ._pieces import (
    Blocks,
    FeedForward,
    added_layers_of,
    added_stream_of,
    joined,
    layers_of,
    modulation,
    stream_of,
    streams_of,
)
from ._ragged import Lengths, Ragged

_MODULE = "diffusers.models.transformers.transformer_hunyuan_video"
SOURCES = {
    f"{_MODULE}:HunyuanVideoAttnProcessor2_0.__call__": "90a316904132b688",
    f"{_MODULE}:HunyuanVideoTransformerBlock.forward": "0ffec006ec98cf21",
    f"{_MODULE}:HunyuanVideoSingleTransformerBlock.forward": "390eb97d3b61e148",
    f"{_MODULE}:HunyuanVideoTokenReplaceTransformerBlock.forward": "63f040855980e373",
    f"{_MODULE}:HunyuanVideoTokenReplaceSingleTransformerBlock.forward": "a7d4385d8bda98ff",
    f"{_MODULE}:HunyuanVideoTokenReplaceAdaLayerNormZero.forward": "c1d73c7e8dbc0dc3",
    f"{_MODULE}:HunyuanVideoTokenReplaceAdaLayerNormZeroSingle.forward": "89b7ae3d1797431e",
    f"{_MODULE}:HunyuanVideoTransformer3DModel.forward": "2458a0dff2b932f3",
    f"{recognise.NORMALIZATION}:AdaLayerNormZero.forward": "7f6150eaa21e8087",
    f"{recognise.NORMALIZATION}:AdaLayerNormZeroSingle.forward": "93c8a4f060a42a98",
    f"{recognise.NORMALIZATION}:RMSNorm.forward": "e5796f5e37ef7276",
    f"{recognise.EMBEDDINGS}:apply_rotary_emb": "0c8ce05b3e63ea69",
    f"{recognise.ATTENTION}:FeedForward.forward": "70a2270098142318",
    f"{recognise.ACTIVATIONS}:GELU.forward": "904ef34cfb52ebf0",
}
Rotary = tuple[Tensor, Tensor] | None


def _modulation(
    norm: Any, temb: Tensor, token_replace_emb: Tensor | None, chunks: int, replaced: bool
) -> tuple[Tensor, ...]:
    """Parameters `[B, C]`, or `[B, 2, C]` with those of the first frame's tokens before the others'."""
    rest = modulation(norm, temb, chunks)
    if not replaced:
        return rest
    assert token_replace_emb is not None
    first = modulation(norm, token_replace_emb, chunks)
    return tuple(torch.stack(pair, dim=1) for pair in zip(first, rest, strict=True))


def _tables(rotary: Rotary) -> tuple[Tensor | None, Tensor | None]:
    if rotary is None:
        return None, None
    # The tables [S, D] hold every angle twice, and meet float32 queries.
    cos, sin = (table[:, ::2].float() for table in rotary)
    return cos, sin


def double_block(blocks: Blocks, replaced: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of HunyuanVideoTransformerBlock, or of HunyuanVideoTokenReplaceTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | Ragged | None = None,
        freqs_cis: Rotary = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        recognise.check_processor(self.attn, "attn", "HunyuanVideoAttnProcessor2_0")
        attn, split = self.attn, num_tokens if replaced else None
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation(
            self.norm1, temb, token_replace_emb, 6, replaced
        )
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = modulation(self.norm1_context, temb, 6)
        layers, c_layers = layers_of(attn), added_layers_of(attn)
        x, *outs = blocks.fanout(self.norm1.norm, hidden_states, scale, shift, layers, split=split)
        text, *c_outs = blocks.fanout(self.norm1_context.norm, encoder_hidden_states, c_scale, c_shift, c_layers)

        with blocks.unsaved("norm", *outs, *c_outs):
            q, k, value = blocks.heads(attn, layers, outs)
            c_q, c_k, c_value = blocks.heads(attn, c_layers, c_outs)
        video = stream_of(attn, q, k, *_tables(freqs_cis))
        query, key = blocks.norm_rope(attn, video, added_stream_of(attn, c_q, c_k))
        attended = blocks.attend(attn, query, key, torch.cat([value, c_value], dim=1), attention_mask)
        attended, c_attended = streams_of(attended, x.shape[1], attn.norm_q)
        y = blocks.projected(attn.to_out, attended, gate, split)
        c_y = blocks.projected((attn.to_add_out,), c_attended, c_gate)

        x, out = blocks.gated_norm(self.norm2, x, y, gate, mlp_scale, mlp_shift, split=split)
        text, c_out = blocks.gated_norm(self.norm2_context, text, c_y, c_gate, c_mlp_scale, c_mlp_shift)
        x = blocks.gated(x, blocks.feed_forward(self.ff, out, mlp_gate, split), mlp_gate, split=split)
        text = blocks.gated(text, blocks.feed_forward(self.ff_context, c_out, c_mlp_gate), c_mlp_gate)
        return x, text

    return forward


def single_block(blocks: Blocks, replaced: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of HunyuanVideoSingleTransformerBlock, or of HunyuanVideoTokenReplaceSingleTransformerBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | Ragged | None = None,
        image_rotary_emb: Rotary = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        recognise.check_processor(self.attn, "attn", "HunyuanVideoAttnProcessor2_0")
        attn, split = self.attn, num_tokens if replaced else None
        tokens = hidden_states.shape[1]
        x = joined(hidden_states, encoder_hidden_states)
        shift, scale, gate = _modulation(self.norm, temb, token_replace_emb, 3, replaced)
        layers = (self.proj_mlp, *layers_of(attn))
        x, mlp_out, *outs = blocks.fanout(self.norm.norm, x, scale, shift, layers, split=split)

        mlp = FeedForward(blocks, (self.proj_mlp, self.proj_out), mlp_out, gate, split)
        with blocks.unsaved("norm", mlp_out):
            hidden = mlp.hidden(mlp_out)
            q, k, value = blocks.heads(attn, layers[1:], outs)
        query, key = blocks.norm_rope(attn, stream_of(attn, q, k, *_tables(image_rotary_emb)))
        attended = blocks.attend(attn, query, key, value, attention_mask)
        x = blocks.gated(x, mlp.project(hidden, attended), gate, split=split)
        return x[:, :tokens], x[:, tokens:]

    return forward


def trimmed_forward() -> Callable[..., Any]:
    """The forward of a model whose attention goes by the lengths of prompts, without a mask."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import apply_lora_scale

    lengths = Lengths(text_first=False, leading=True)

    @apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]  # diffusers has no types
    def forward(
        self: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        batch, _, frames, height, width = hidden_states.shape
        p, p_t = self.config.patch_size, self.config.patch_size_t
        grid = frames // p_t, height // p, width // p
        trimmed = lengths(self, encoder_attention_mask, grid[0] * grid[1] * grid[2])
        if trimmed is None:
            # The LoRA scale is applied already, and left out of the arguments by the decorator.
            return type(self).forward(
                self,
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_attention_mask,
                pooled_projections,
                guidance,
                attention_kwargs,
                return_dict,
            )
        length, ragged = trimmed
        text = encoder_hidden_states[:, :length]
        rotary = self.rope(hidden_states)
        temb, token_replace_emb = self.time_text_embed(timestep, pooled_projections, guidance)
        x = self.x_embedder(hidden_states)
        text = self.context_embedder(text, timestep, encoder_attention_mask[:, :length])
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            arguments = (x, text, temb, ragged, rotary, token_replace_emb, grid[1] * grid[2])
            x, text = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)
        x = self.proj_out(self.norm_out(x, temb))
        x = x.reshape(batch, *grid, -1, p_t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    return cast(Callable[..., Any], forward)


_DOUBLE = {"HunyuanVideoTransformerBlock": False, "HunyuanVideoTokenReplaceTransformerBlock": True}
_SINGLE = {"HunyuanVideoSingleTransformerBlock": False, "HunyuanVideoTokenReplaceSingleTransformerBlock": True}


def check(transformer: nn.Module) -> None:
    """Refuses a model whose blocks differ from what the replacements compute."""
    model: Any = transformer
    for i, block in enumerate(model.transformer_blocks):
        where = f"transformer_blocks.{i}"
        recognise.check_block(block, where, *_DOUBLE)
        recognise.check_processor(block.attn, f"{where}.attn", "HunyuanVideoAttnProcessor2_0")
        recognise.check_rms_norms(block.attn, f"{where}.attn", ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        recognise.check_plain_layer_norms(block, where, "norm1.norm", "norm1_context.norm", "norm2", "norm2_context")
        recognise.check_feed_forwards(block, where, "ff", "ff_context")
    for i, block in enumerate(model.single_transformer_blocks):
        where = f"single_transformer_blocks.{i}"
        recognise.check_block(block, where, *_SINGLE)
        recognise.check_processor(block.attn, f"{where}.attn", "HunyuanVideoAttnProcessor2_0")
        recognise.check_rms_norms(block.attn, f"{where}.attn", ("norm_q", "norm_k"))
        recognise.check_plain_layer_norms(block, where, "norm.norm")


def forwards(transformer: nn.Module, blocks: Blocks) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Every block with its new forward, and the model's own where text is trimmed."""
    model: Any = transformer
    for block in model.transformer_blocks:
        yield block, double_block(blocks, _DOUBLE[type(block).__name__])
    for block in model.single_transformer_blocks:
        yield block, single_block(blocks, _SINGLE[type(block).__name__])
    if blocks.trim_text:
        yield transformer, trimmed_forward()


FAMILY = recognise.Family("HunyuanVideoTransformer3DModel", SOURCES, check, forwards, trims=True)
