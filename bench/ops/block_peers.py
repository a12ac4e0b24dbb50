"""The ops as diffusers' blocks compute them: its own modules and functions, or its lines where it has no function."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Peer = Callable[..., tuple[Tensor, ...]]
EPS = 1e-6


def norm_modulate(consumers: int) -> Peer:
    """AdaLayerNormZero; x goes on, and so many layers take the result."""

    def call(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        out = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]
        return x.view_as(x), *[out] * consumers

    return call


def norm_modulate_in_float(consumers: int) -> Peer:
    """WanTransformerBlock: FP32LayerNorm and modulation in float32."""

    def call(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
        out = (normed * (1 + scale[:, None]) + shift[:, None]).type_as(x)
        return x.view_as(x), *[out] * consumers

    return call


def gated_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, ...]:
    """HunyuanVideoTransformerBlock and FluxTransformerBlock, between attention and feed-forward."""
    h = x + y * gate.unsqueeze(1)
    return h, F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def gated_residual_norm_in_float(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """WanTransformerBlock before its cross-attention."""
    h = (x.float() + y * gate[:, None]).type_as(x)
    return h, F.layer_norm(h.float(), h.shape[-1:], weight.float(), bias.float(), EPS).type_as(h)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """The end of a block."""
    return (x + gate.unsqueeze(1) * y,)


def gated_residual_in_float(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """The end of a WanTransformerBlock."""
    return ((x.float() + y.float() * gate[:, None]).type_as(x),)


def _with_weight(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """A norm's own forward, with a weight that is an input of the case."""
    return cast(Tensor, torch.func.functional_call(module, {"weight": weight}, (x,)))


def hunyuan_qk(cos: Tensor, sin: Tensor, joint: bool) -> Peer:
    """HunyuanVideoAttnProcessor2_0: diffusers' RMSNorm, rotation of the image's tokens, one sequence."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    norm: Any = RMSNorm(cos.shape[-1], EPS)
    tables = cos, sin

    def double(q: Tensor, k: Tensor, c_q: Tensor, c_k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        found = []
        for x, text, weight, c_weight in ((q, c_q, *weights[0::2]), (k, c_k, *weights[1::2])):
            turned = apply_rotary_emb(_with_weight(norm, x, weight), tables, sequence_dim=1)
            found.append(torch.cat([turned, _with_weight(norm, text, c_weight)], dim=1))
        return tuple(found)

    def single(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        found = []
        for x, weight in ((q, weights[0]), (k, weights[1])):
            x = _with_weight(norm, x, weight)
            turned = apply_rotary_emb(x[:, : len(cos)], tables, sequence_dim=1)
            found.append(torch.cat([turned, x[:, len(cos) :]], dim=1))
        return tuple(found)

    return double if joint else single


def flux_qk(cos: Tensor, sin: Tensor, joint: bool) -> Peer:
    """FluxAttnProcessor: torch's RMSNorm, one sequence with the text first, rotation of all of it."""
    from diffusers.models.embeddings import apply_rotary_emb

    norm = nn.RMSNorm(cos.shape[-1], eps=EPS)
    tables = cos, sin

    def double(c_q: Tensor, c_k: Tensor, q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        found = []
        for text, x, c_weight, weight in ((c_q, q, *weights[0::2]), (c_k, k, *weights[1::2])):
            both = torch.cat([_with_weight(norm, text, c_weight), _with_weight(norm, x, weight)], dim=1)
            found.append(apply_rotary_emb(both, tables, sequence_dim=1))
        return tuple(found)

    def single(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        pairs = ((q, weights[0]), (k, weights[1]))
        return tuple(apply_rotary_emb(_with_weight(norm, x, w), tables, sequence_dim=1) for x, w in pairs)

    return double if joint else single


def wan_qk(cos: Tensor, sin: Tensor) -> Peer:
    """WanAttnProcessor: torch's RMSNorm over all heads, and its rotation, a function inside another one."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = a * c - b * s
        out[..., 1::2] = a * s + b * c
        return out.type_as(x)

    def call(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        found = []
        for x, weight in ((q, weights[0]), (k, weights[1])):
            normed = F.rms_norm(x.flatten(2), weight.shape, weight, EPS)
            found.append(turned(normed.unflatten(2, x.shape[2:])))
        return tuple(found)

    return call


def gelu_tanh(x: Tensor) -> tuple[Tensor, ...]:
    """FeedForward's activation."""
    return (F.gelu(x, approximate="tanh"),)


def gelu_behind(x: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
    """A single-stream block before its last projection."""
    return (torch.cat([attended, F.gelu(x, approximate="tanh")], dim=2),)
