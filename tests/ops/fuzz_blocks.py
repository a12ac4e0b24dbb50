"""Fuzzed calls of the ops of transformer blocks, and what they compute written anew."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.ops.gated_projection import gated_projection, gated_projection_norm_modulate
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_linear import gelu_linear
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from ..tolerances import assert_within_budget, chain_error
from .fuzz_draws import BF16, F16, F32, F64, NO_DTYPE, NO_SWITCH, NO_WORD, ODD, Call, Draw, no_int, no_number, no_tensor

# `formula(up, down, *leaves)`: `up` takes a stored tensor to the dtype of the arithmetic, `down` stores a result.
Formula = Callable[..., tuple[Tensor, ...]]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


def same(values: Tensor) -> Tensor:
    return values


def judged(
    draw: Draw, formula: Formula, leaves: Sequence[Tensor], lossless: bool, grads: bool = True, terms: int = 1
) -> Any:
    """A check of outputs, and of the gradients by `leaves`, of a formula.

    The truth is in float64; plain torch computes wide and rounds what is stored, or is eager torch. `terms`: what a
    number is summed from on another way than the formula's.
    """
    dtype = leaves[0].dtype
    arithmetic = dtype if lossless else wide(dtype)

    def plain_up(values: Tensor) -> Tensor:
        return values.to(arithmetic)

    def plain_down(values: Tensor) -> Tensor:
        return values.to(dtype)

    def judge(ours: Tensor, truth: Tensor, plain: Tensor) -> None:
        assert ours.dtype == dtype
        assert_within_budget(ours, truth, plain, terms * chain_error(truth, arithmetic))

    def check(found: Any) -> None:
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
        double, own = ([t.detach().to(to).requires_grad_() for t in leaves] for to in (F64, dtype))
        exact, plain = formula(same, same, *double), formula(plain_up, plain_down, *own)
        for ours, truth, rounded in zip(outputs, exact, plain, strict=True):
            judge(ours.detach(), truth.detach(), rounded.detach())
        if not grads:
            return
        incoming = [draw.normal(*t.shape, dtype=dtype) for t in outputs]
        ours = torch.autograd.grad(outputs, leaves, incoming)
        truth = torch.autograd.grad(exact, double, [g.double() for g in incoming])
        for triple in zip(ours, truth, torch.autograd.grad(plain, own, incoming), strict=True):
            judge(*triple)

    return check


def leaf(draw: Draw, *shape: int, dtype: torch.dtype, plain: bool = False) -> Tensor:
    return (draw.normal if plain else draw.laid_out)(*shape, dtype=dtype).requires_grad_()


def spread(values: Tensor, tokens: int, split: int | None) -> Tensor:
    """Parameters for each token: `[B, C]` for all, `[B, 2, C]` before and from `split`."""
    if values.ndim == 2:
        return values[:, None]
    if split is None:
        return values
    return torch.cat([values[:, :1].expand(-1, split, -1), values[:, 1:].expand(-1, tokens - split, -1)], dim=1)


def normed(x: Tensor, norm: str, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The papers' formulas."""
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


class Tokens:
    """Shapes, dtypes and settings of a call on `[B, S, C]`."""

    def __init__(self, draw: Draw) -> None:
        self.batch, self.tokens, self.channels = draw.rng.randint(1, 3), draw.rng.randint(1, 6), draw.of(4, 6, 17)
        self.dtype = draw.of(F32, F32, BF16, F16, F64)
        self.split = draw.rng.randint(0, self.tokens) if draw.maybe(0.3) else None
        self.mode = draw.of("fast", "lossless")
        self.settings = {"split": self.split, "mode": self.mode, "backend": draw.of("auto", "reference")}
        self.refused: dict[str, tuple[Any, ...]] = {
            "split": no_int(0, self.tokens, optional=True),
            "mode": NO_WORD,
            "backend": ("cpu", "cuda", "triton", *NO_WORD),
        }

    def x(self, draw: Draw) -> Tensor:
        return leaf(draw, self.batch, self.tokens, self.channels, dtype=self.dtype)

    def rows(self, draw: Draw) -> Tensor:
        if self.split is not None:
            return leaf(draw, self.batch, 2, self.channels, dtype=self.dtype)
        shape = (self.batch, self.channels) if draw.maybe() else (self.batch, self.tokens, self.channels)
        return leaf(draw, *shape, dtype=self.dtype)

    def row(self, draw: Draw) -> Tensor:
        return leaf(draw, self.channels, dtype=self.dtype, plain=True)


def gated_call(draw: Draw) -> Call:
    t = Tokens(draw)
    x, y, gate = t.x(draw), t.x(draw), t.rows(draw)

    def formula(up: Any, down: Any, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return (down(up(x) + spread(up(gate), t.tokens, t.split) * up(y)),)

    check = judged(draw, formula, (x, y, gate), t.mode == "lossless")
    refused = t.refused | {"x": no_tensor(x), "y": no_tensor(y), "gate": no_tensor(gate)}
    return Call(gated_residual, {"x": x, "y": y, "gate": gate, **t.settings}, check, refused)


def norm_call(draw: Draw) -> Call:
    """All three forms of the modulated norm."""
    t, form = Tokens(draw), draw.of(norm_modulate, norm_modulate_fanout, gated_residual_norm_modulate)
    norm, eps = draw.of("layer", "rms"), draw.of(1e-6, 1e-5, 1)
    tensors: dict[str, Tensor] = {"x": t.x(draw)}
    if form is gated_residual_norm_modulate:
        tensors |= {"y": t.x(draw), "gate": t.rows(draw)}
    if draw.maybe(0.7):
        tensors |= {"scale": t.rows(draw), "shift": t.rows(draw)}
    if draw.maybe(0.4):
        tensors |= {"weight": t.row(draw)} | ({"bias": t.row(draw)} if draw.maybe() else {})
    settings = t.settings | {"norm": norm, "eps": eps}
    refused = t.refused | {"norm": NO_WORD, "eps": (0.0, *no_number(0.0)), "norm_dtype": (F64, *NO_DTYPE)}
    needed = {"x", "y", "gate", "scale", "shift"}
    refused |= {
        name: no_tensor(value, optional=name not in needed, any_shape=len(tensors) == 1)
        for name, value in tensors.items()
    }
    if "scale" not in tensors:
        refused |= {"scale": (torch.zeros(t.batch, t.channels),), "shift": (torch.zeros(t.batch, t.channels),)}
    consumers = 1
    if form is norm_modulate_fanout:
        settings["consumers"] = consumers = draw.rng.randint(1, 3)
        refused["consumers"] = no_int(1)

    def formula(up: Any, down: Any, *values: Tensor) -> tuple[Tensor, ...]:
        stored = dict(zip(tensors, values, strict=True))
        named = {name: up(value) for name, value in stored.items()}
        h = stored["x"]
        if "y" in named:
            h = down(named["x"] + spread(named["gate"], t.tokens, t.split) * named["y"])
        out = normed(up(h), norm, eps, named.get("weight"), named.get("bias"))
        if "scale" in named:
            scale, shift = (spread(named[name], t.tokens, t.split) for name in ("scale", "shift"))
            out = out * (1 + scale) + shift
        residual = () if form is norm_modulate else (h,)
        return *residual, *(down(out),) * consumers

    # Eager torch rounds a gradient in more places than one expression of the formula has.
    check = judged(draw, formula, list(tensors.values()), t.mode == "lossless", grads=t.mode == "fast")
    return Call(form, tensors | settings, check, refused)


def projection_call(draw: Draw) -> Call:
    t, form = Tokens(draw), draw.of(gated_projection, gated_projection_norm_modulate)
    width = draw.of(3, 8)
    x, inputs = t.x(draw), leaf(draw, t.batch, t.tokens, width, dtype=t.dtype)
    weight, gate = leaf(draw, t.channels, width, dtype=t.dtype), leaf(draw, t.batch, t.channels, dtype=t.dtype)
    bias = t.row(draw) if draw.maybe(0.7) else None
    tensors = {"x": x, "inputs": inputs, "weight": weight, "gate": gate} | ({} if bias is None else {"bias": bias})
    arguments: dict[str, Any] = {**tensors, "bias": bias, "backend": draw.of("auto", "reference")}
    refused = {name: no_tensor(value, optional=name == "bias") for name, value in tensors.items()}
    refused |= {"backend": t.refused["backend"]}
    norm = form is gated_projection_norm_modulate
    if norm:
        refused |= {
            "eps": (0.0, *no_number(0.0)),
            "scale": (gate,),
            "norm_dtype": NO_DTYPE,
            "norm_weight": (gate, *ODD),
        }

    def formula(
        up: Any, down: Any, x: Tensor, inputs: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        y = inputs @ weight.T
        h = down(up(x) + up(gate)[:, None] * up(y if bias is None else y + bias))
        return (h, down(normed(up(h), "layer", 1e-6, None, None))) if norm else (h,)

    # The weight's gradient is summed sample by sample, and the gate's from it, not from the projection.
    terms = width * t.batch
    check = judged(draw, formula, list(tensors.values()), False, grads=t.dtype in (F32, F64), terms=terms)
    return Call(form, arguments, check, refused)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gelu_call(draw: Draw) -> Call:
    t, form = Tokens(draw), draw.of(gelu_tanh, gelu_linear)
    lead = draw.of((), (3,), (2, 5))
    name = "x" if form is gelu_tanh else "h"
    lead = lead or ((4,) if form is gelu_linear else ())
    tensors = {name: leaf(draw, *lead, t.channels, dtype=t.dtype, plain=len(lead) < 1)}
    if draw.maybe():
        tensors["prefix"] = leaf(draw, *lead, 3, dtype=t.dtype, plain=len(lead) < 1)
    width = t.channels + (3 if "prefix" in tensors else 0)
    arguments: dict[str, Any] = {"mode": t.mode, "backend": t.settings["backend"]}
    refused: dict[str, tuple[Any, ...]] = {"mode": NO_WORD, "backend": t.refused["backend"], "prefix": ODD}
    if form is gelu_linear:
        tensors["weight"] = leaf(draw, 5, width, dtype=t.dtype)
        if draw.maybe():
            tensors["bias"] = leaf(draw, 5, dtype=t.dtype, plain=True)
        arguments["bias"] = tensors.get("bias")
        refused["h_bias"] = no_tensor(torch.zeros(t.channels, dtype=t.dtype), optional=True)
    else:
        arguments["keep_prefix"] = draw.maybe()
        refused["keep_prefix"] = NO_SWITCH
    for key, value in tensors.items():
        bad = no_tensor(value, optional=key in ("prefix", "bias"), any_shape=len(tensors) == 1)
        # Rows may have any dimensions, and in `gelu_tanh` both parts any width.
        free = [(1, 1, *value.shape)] if key == "h" and "prefix" not in tensors else []
        free += [(*value.shape[:-1], 2 * value.shape[-1])] if form is gelu_tanh else []
        refused[key] = tuple(v for v in bad if not isinstance(v, Tensor) or tuple(v.shape) not in free)

    def formula(up: Any, down: Any, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(tensors, values, strict=True))
        joint = down(gelu(up(named[name])))
        joint = torch.cat([named["prefix"], joint], dim=-1) if "prefix" in named else joint
        if form is gelu_tanh:
            return (joint,)
        out = joint @ named["weight"].T
        return (out + named["bias"] if "bias" in named else out,)

    grads = t.dtype in (F32, F64) or form is gelu_tanh
    check = judged(draw, formula, list(tensors.values()), lossless=t.mode == "lossless", grads=grads, terms=width)
    return Call(form, tensors | arguments, check, refused)


def turned(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """Each pair as a complex number times `exp(i angle)`, written out; later tokens stay."""
    head, tail = x[:, : len(cos)], x[:, len(cos) :]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    half = x.shape[-1] // 2
    places = (slice(0, half), slice(half, None)) if rope == "half" else (slice(0, None, 2), slice(1, None, 2))
    first, second = (head[..., place] for place in places)
    factors = [(cos, sin), (cos, sin)]
    if cos.shape[-1] != half:
        factors = [(cos[..., place], sin[..., place]) for place in places]
    out = torch.zeros_like(head)
    out[..., places[0]] = first * factors[0][0] - second * factors[0][1]
    out[..., places[1]] = second * factors[1][0] + first * factors[1][1]
    return torch.cat([out, tail], dim=1)


def rope_call(draw: Draw) -> Call:
    t = Tokens(draw)
    heads, dim = draw.rng.randint(1, 3), draw.of(2, 4, 6)
    norm, rope = draw.of("none", "head", "token"), draw.of("interleaved", "half")
    settings: dict[str, Any] = {"norm": norm, "rope": rope, "rope_gradient": draw.of("each", "once")}
    settings |= {"mode": "fast", "backend": t.settings["backend"], "eps": draw.of(1e-6, 1e-5)}
    keys, both = draw.maybe(0.8), draw.maybe()
    counts = [t.tokens, draw.rng.randint(1, 4)][: 1 + both]
    leaves: list[Tensor] = []
    plans, streams = [], []
    for count in counts:
        own: dict[str, Tensor] = {"query": leaf(draw, t.batch, count, heads, dim, dtype=t.dtype)}
        if keys:
            own["key"] = leaf(draw, t.batch, count, heads, dim, dtype=t.dtype)
        if norm != "none" and draw.maybe():
            size = heads * dim if norm == "token" else dim
            own["q_weight"] = leaf(draw, size, dtype=t.dtype, plain=True)
            own |= {"k_weight": leaf(draw, size, dtype=t.dtype, plain=True)} if keys else {}
        angles = draw.normal(draw.rng.randint(1, count), draw.of(dim, dim // 2), dtype=F64)
        table = (angles.cos().float(), angles.sin().float()) if draw.maybe(0.7) else None
        plans.append((list(own), table))
        leaves += own.values()
        streams.append(Stream(**own) if table is None else Stream(**own, cos=table[0], sin=table[1]))

    def formula(up: Any, down: Any, *values: Tensor) -> tuple[Tensor, ...]:
        left, queries, parts = [up(value) for value in values], [], []
        for names, table in plans:
            named = {name: left.pop(0) for name in names}
            for part, weight, found in (("query", "q_weight", queries), ("key", "k_weight", parts)):
                if part not in named:
                    continue
                x = named[part]
                if norm != "none":
                    rows = x.flatten(2) if norm == "token" else x
                    x = normed(rows, "rms", settings["eps"], named.get(weight), None).view(x.shape)
                found.append(x if table is None else turned(x, *(c.to(x.dtype) for c in table), rope))
        return tuple(down(torch.cat(found, dim=1)) for found in (queries, parts) if found)

    first, tail = streams[0], streams[1:]
    bad_streams = [first._replace(query=bad) for bad in no_tensor(first.query)[:9]]
    bad_streams += [
        first._replace(cos=bad, sin=torch.zeros(1, dim)) for bad in (None, torch.zeros(99, dim), [1.0], *ODD)
    ]
    refused: dict[str, tuple[Any, ...]] = {
        "stream": (None, tuple(first), first.query, *bad_streams, *ODD),
        "second": (tuple(first), first.query, first._replace(query=first.query[..., :1]), *ODD),
        "eps": (0.0, *no_number(0.0)),
        **dict.fromkeys(("norm", "rope", "rope_gradient", "mode"), NO_WORD),
        "backend": t.refused["backend"],
    }
    arguments = {"stream": first, "second": tail[0] if tail else None, **settings}
    return Call(qk_norm_rope, arguments, judged(draw, formula, leaves, lossless=False), refused)


KINDS = (gated_call, norm_call, norm_call, projection_call, gelu_call, rope_call)
