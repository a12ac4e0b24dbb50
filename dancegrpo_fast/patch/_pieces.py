"""What blocks of all families are made of, on the block ops."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from ..ops import lora_linear
from ..ops.gated_projection import gated_projection, gated_projection_norm_modulate
from ..ops.gated_residual import gated_residual
from ..ops.gelu_linear import gelu_linear
from ..ops.gelu_tanh import gelu_tanh
from ..ops.norm_modulate import gated_residual_norm_modulate, norm_modulate_fanout
from ..ops.qk_norm_rope import Stream, qk_norm_rope
from ._layers import adapted, is_plain_linear, unhooked
from ._ragged import Ragged, attend, packed
from ._settings import Settings


def affine_of(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm that is not called, or of none; accelerate's offloading holds them for a call only.

    Raises:
        ValueError: FSDP holds the norm apart from its block, and gathers its weight for a call only.
    """
    hook = getattr(norm, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(norm)
    found = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if hasattr(norm, "_fsdp_wrapped_module") or hasattr(found[0], "placements"):
        raise ValueError(
            f"norm: got a {type(norm).__name__} that is a unit of its own, want its weight in its block's unit"
            " (leave norms out of the wrap policy)"
        )
    if hook is not None:
        hook.post_forward(norm, None)
    return found


def weight_of(norm: Any) -> Tensor | None:
    """The weight of a norm without a bias, or of none."""
    return affine_of(norm)[0]


# What slicing leaves in the graph, and what brings offloaded inputs back does.
_CUTS = ("SliceBackward0", "AsStridedBackward0")


def _only_cut(part: Tensor, base: Tensor) -> bool:
    """Whether nothing but slicing lies between a part and its base, so that a gradient may go past the part.

    Hooks sit on outputs of blocks (FSDP's that gather weights before the backward), and full backward hooks and FSDP2
    put nodes of their own in between, which `_base` looks through.
    """
    if not base.requires_grad or not part.requires_grad:
        return base.requires_grad == part.requires_grad
    if part._backward_hooks or part.retains_grad:
        return False
    node, end = part.grad_fn, base.grad_fn
    while node is not None and node is not end and node.name() in _CUTS:
        node = node.next_functions[0][0]
    # A base without a graph, as offloaded inputs come back, ends in the node that fills its gradient.
    return node is not None and (node is end or getattr(node, "variable", None) is base)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """`cat([first, second], dim=1)`, without a copy where both are the two parts of one tensor."""
    base = first._base if not torch.compiler.is_compiling() else None
    if base is None or second._base is not base or base.ndim != 3:
        return torch.cat([first, second], dim=1)
    batch, tokens, channels = first.shape
    whole = (batch, tokens + second.shape[1], channels)
    in_order = first.storage_offset() == base.storage_offset() and (
        second.storage_offset() == base.storage_offset() + tokens * base.stride(1)
    )
    same_steps = first.stride() == second.stride() == base.stride()
    whole_base = base.shape == whole and in_order and same_steps and first.dtype == base.dtype
    if whole_base and _only_cut(first, base) and _only_cut(second, base):
        return base
    return torch.cat([first, second], dim=1)


def modulation(norm: nn.Module, temb: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """`linear(silu(temb))` of an adaptive norm, in its parts `[B, C]`."""
    found: tuple[Tensor, ...] = cast(Any, norm).linear(cast(Any, norm).silu(temb)).chunk(chunks, dim=1)
    return found


def _norm_dtype(x: Tensor) -> torch.dtype | None:
    """CUDA's autocast normalises in float32 and hands that on; the CPU's does not."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else None


@dataclass(frozen=True)
class Unprojected:
    """An output projection that is left to the op which adds its result, and does not keep it."""

    layer: nn.Linear
    inputs: Tensor


@dataclass(frozen=True)
class Projected:
    """A layer's product, and its bias where that was detached: the op that reads the product gives its gradient."""

    out: Tensor
    bias: Tensor | None = None

    def heads(self, dim: int) -> "Projected":
        """The product as `[B, S, H, D]`."""
        return Projected(self.out.unflatten(-1, (-1, dim)), self.bias)


def with_bias_detached(layer: nn.Linear, x: Tensor) -> Projected:
    """A plain layer's product, computed without calling it."""
    bias = layer.bias
    return Projected(F.linear(x, layer.weight, None if bias is None else bias.detach()), bias)


def _own_products(x: Tensor) -> bool:
    """Whether products of plain layers may be computed, with gradients, without calling these."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not nn_module._has_any_global_hook()
    )


def _is_idle(dropout: Any) -> bool:
    return unhooked(dropout) and not (dropout.p > 0 and dropout.training)


def _left_unprojected(
    settings: Settings, layer: Any, dropouts: Iterable[Any], inputs: Tensor, gate: Tensor, split: int | None
) -> bool:
    if not settings.gates_from_weights or split is not None or not (gate.ndim == 2 or gate.shape[1] == 1):
        return False
    plain = type(layer) is nn.Linear and unhooked(layer) and not any(each.p > 0 and each.training for each in dropouts)
    trained = plain and torch.is_grad_enabled() and gate.requires_grad and layer.weight.requires_grad
    same = trained and layer.weight.dtype == inputs.dtype
    return same and not torch.is_autocast_enabled(inputs.device.type)


def layers_of(attn: Any) -> tuple[Any, ...]:
    """The layers that give queries, keys and values."""
    return attn.to_q, attn.to_k, attn.to_v


def added_layers_of(attn: Any) -> tuple[Any, ...]:
    """The same of the text, where it has its own."""
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj


def _stream(query: Projected, key: Projected, norms: tuple[Any, Any], tables: tuple[Tensor | None, ...]) -> Stream:
    stream = Stream(query.out, key.out, *map(weight_of, norms), *tables)
    return stream._replace(q_bias=query.bias, k_bias=key.bias)


def stream_of(attn: Any, query: Projected, key: Projected, *tables: Tensor | None) -> Stream:
    """One stream's queries and keys with the norms' weights; `tables`: cosines and sines."""
    return _stream(query, key, (attn.norm_q, attn.norm_k), tables)


def added_stream_of(attn: Any, query: Projected, key: Projected, *tables: Tensor | None) -> Stream:
    """The same of the text, whose norms are its own."""
    return _stream(query, key, (attn.norm_added_q, attn.norm_added_k), tables)


class FeedForward:
    """Linear, GELU, dropout, linear; where both layers are plain ones, the backward has GELU's part in one pass."""

    def __init__(
        self,
        blocks: "Blocks",
        layers: tuple[Any, Any],
        x: Tensor,
        gate: Tensor,
        split: int | None = None,
        dropout: Any = None,
    ):
        self.blocks, self.gate, self.split, self.dropout = blocks, gate, split, dropout
        self.first, self.last = layers
        self.fused = (
            blocks.recompute != "none"
            and _own_products(x)
            and (dropout is None or _is_idle(dropout))
            and all(is_plain_linear(layer, x.dtype) for layer in layers)
            and not _left_unprojected(blocks, self.last, (), x, gate, split)
        )

    def hidden(self, x: Tensor) -> Tensor:
        """What GELU reads."""
        if not self.fused:
            return self.blocks.linear(self.first, x)
        return with_bias_detached(self.first, x).out

    def project(self, hidden: Tensor, prefix: Tensor | None = None) -> Projected | Unprojected:
        """What the last layer makes of GELU's result behind the prefix, or that layer itself where it can be left."""
        blocks, last = self.blocks, self.last
        if self.fused:
            more = {"prefix": prefix, "h_bias": self.first.bias}
            handed = blocks.hands_over(last, hidden)
            bias = last.bias.detach() if handed else last.bias
            out = gelu_linear(hidden, last.weight, bias, **more, **blocks.options)
            return Projected(out, last.bias if handed else None)
        keep = blocks.recompute != "none"
        activated = gelu_tanh(hidden, prefix=prefix, keep_prefix=keep, **blocks.options)
        activated = activated if self.dropout is None else self.dropout(activated)
        with blocks.unsaved("gelu", activated):
            return blocks.projected((last,), activated, self.gate, self.split)


def streams_of(attended: Tensor, tokens: int, norm: Any) -> tuple[Tensor, Tensor]:
    """Both streams' parts of the attention output, laid out as diffusers' processors hand them to the projections.

    Layout decides between the fused and the unfused bias of a linear layer. A float32 norm promotes bfloat16 queries
    (under autocast), the output is cast to their dtype and back, and so becomes contiguous.
    """
    # One split has one gradient, two slices have two that are padded and added.
    first, rest = attended.split_with_sizes([tokens, attended.shape[1] - tokens], dim=1)
    promoted = norm is not None and norm.weight is not None and norm.weight.dtype != attended.dtype
    return (first.contiguous(), rest.contiguous()) if promoted else (first, rest)


def clipped(x: Tensor) -> Tensor:
    """Float16 within its finite range, as diffusers' blocks do."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Blocks(Settings):
    """The pieces of a block that compute as the settings say."""

    def fanout(
        self, norm: Any, x: Tensor, scale: Any, shift: Any, layers: Iterable[Any], **more: Any
    ) -> tuple[Tensor, ...]:
        """A LayerNorm with modulation for the layers that take it: `(x, out, ..., out)`."""
        layers = tuple(layers)
        options = self.options | {"norm_dtype": _norm_dtype(x)} | more
        # A layer of several products, as under LoRA, gives several gradients, which autograd adds one by one.
        one_each = self.mode == "fast" or all(type(layer) is nn.Linear for layer in layers)
        consumers = len(layers) if one_each else 1
        x, *outs = norm_modulate_fanout(x, scale, shift, consumers=consumers, eps=norm.eps, **options)
        return x, *outs * (len(layers) // consumers)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """What a layer makes of x; where it is one with a LoRA update, by `lora_linear`."""
        parts = adapted(layer, x)
        return cast(Tensor, layer(x)) if parts is None else lora_linear.call(x, *parts, self.mode)

    def hands_over(self, layer: Any, x: Tensor) -> bool:
        """Whether a layer's product may have its bias detached, for the op that reads it to give the bias's gradient.

        "lossless" keeps the sum where eager has it.
        """
        plain = self.mode == "fast" and _own_products(x) and is_plain_linear(layer, x.dtype)
        return plain and layer.bias is not None and layer.bias.requires_grad

    def product(self, layer: Any, x: Tensor, handed: bool = True) -> Projected:
        """What a layer makes of x; `handed` to an op that takes the bias too."""
        apart = handed and self.hands_over(layer, x)
        return with_bias_detached(layer, x) if apart else Projected(self.linear(layer, x))

    def heads(
        self, attn: Any, layers: Iterable[Any], outs: Iterable[Tensor], handed: bool = True
    ) -> tuple[Projected, Projected, Tensor]:
        """Queries, keys and values `[B, S, H, D]` of each consumer's tokens; no op of ours reads values.

        `handed`: queries and keys go to one that takes their biases.
        """
        (to_q, x_q), (to_k, x_k), (to_v, x_v) = zip(layers, outs, strict=True)
        dim = attn.inner_dim // attn.heads
        query, key = (self.product(*each, handed).heads(dim) for each in ((to_q, x_q), (to_k, x_k)))
        return query, key, self.linear(to_v, x_v).unflatten(-1, (-1, dim))

    def projected(
        self, layers: Iterable[Any], inputs: Tensor, gate: Tensor, split: int | None = None
    ) -> Projected | Unprojected:
        """What the layers (a projection, then dropout) make of `inputs`, or the projection where it can be left."""
        first, *rest = layers
        if _left_unprojected(self, first, rest, inputs, gate, split):
            return Unprojected(first, inputs)
        found = self.product(first, inputs, all(map(_is_idle, rest)))
        out = found.out
        for layer in rest:
            out = layer(out)
        return Projected(out, found.bias)

    def gated_norm(
        self, norm: Any, x: Tensor, y: Projected | Unprojected, gate: Tensor, scale: Any, shift: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Gated residual, LayerNorm and modulation: `(h, out)`."""
        options = self.options | {"norm_dtype": _norm_dtype(x)} | more
        if not isinstance(y, Unprojected):
            return gated_residual_norm_modulate(x, y.out, gate, scale, shift, y_bias=y.bias, eps=norm.eps, **options)
        layer = y.layer
        rows = gate if gate.ndim == 2 else gate.squeeze(1)
        return gated_projection_norm_modulate(
            *(x, y.inputs, layer.weight, layer.bias, rows, scale, shift),
            norm_weight=options.get("weight"),
            norm_bias=options.get("bias"),
            eps=norm.eps,
            norm_dtype=options["norm_dtype"],
            backend=self.backend,
        )

    def gated(self, x: Tensor, y: Projected | Unprojected, gate: Tensor, **more: Any) -> Tensor:
        """`x + gate y`."""
        if not isinstance(y, Unprojected):
            return gated_residual(x, y.out, gate, y_bias=y.bias, **self.options, **more)
        rows = gate if gate.ndim == 2 else gate.squeeze(1)
        with self.unsaved("gelu", y.inputs):
            return gated_projection(x, y.inputs, y.layer.weight, y.layer.bias, rows, backend=self.backend)

    def feed_forward(self, module: Any, x: Tensor, gate: Tensor, split: int | None = None) -> Projected | Unprojected:
        """A module's whole feed-forward; x must be an output of a block op, and `gate` is what gates the result."""
        first, dropout, last = module.net
        mlp = FeedForward(self, (first.proj, last), x, gate, split, dropout)
        with self.unsaved("norm", x):
            hidden = mlp.hidden(x)
        return mlp.project(hidden)

    def attend(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Ragged | None, parallel: bool = True
    ) -> Tensor:
        """Attention by the backend that the model's processor was told to use, as `[B, S, H D]`."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        processor = attn.processor
        settings = {"dropout_p": 0.0, "is_causal": False, "backend": processor._attention_backend}
        dispatch = partial(dispatch_attention_fn, **settings)
        with self.unsaved("attention", query, key):
            if isinstance(mask, Ragged):
                out = self._ragged(dispatch, query, key, value, mask)
            else:
                config = processor._parallel_config if parallel else None
                out = dispatch(query, key, value, attn_mask=mask, parallel_config=config)
        return out.flatten(2, 3).to(query.dtype)

    def _ragged(self, dispatch: partial[Tensor], query: Tensor, key: Tensor, value: Tensor, ragged: Ragged) -> Tensor:
        again = self.recompute == "all"
        query, key = (packed(t, ragged, again) for t in (query, key))
        with self.unsaved("attention", query, key):
            out = attend(dispatch, query, key, packed(value, ragged, False), ragged)
        return ragged.unpack(out)

    def norm_rope(
        self, attn: Any, first: Stream, second: Stream | None = None, norm: str = "head_twice", **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Joint queries and keys, normalised where the module has norms, rotated where a stream has tables."""
        norm, eps = ("none", 1e-6) if attn.norm_q is None else (norm, attn.norm_q.eps)
        query, key = qk_norm_rope(first, second, norm=norm, eps=eps, **more, **self.options)
        assert key is not None
        return query, key
