"""What published runs had that no setting of the planner says: rules, from the sizes of the call."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.cases import whole_model
from dancegrpo_fast.memory.planning.converted import layers
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.sharding import Gathers, weights_of

# Heads of T5-XXL.
T5_HEADS = 64
# Of all columns, those that bitsandbytes found outliers in: fitted on HunyuanVideo's decode, judged on its denoising.
OUTLIERS = 0.068


class Extra(NamedTuple):
    """Bytes, by a rule that the text says."""

    text: str
    bytes: Callable[[Iteration], float]


def _tokens(it: Iteration) -> int:
    """Of pictures and text together, in all rows."""
    s = it.settings
    reference = s.reference_height, s.reference_width
    return specs.tokens(it.spec, s.frames, s.height, s.width, reference) + (s.text_tokens or it.spec.text_tokens)


def _frozen(it: Iteration) -> list[nn.Linear]:
    model = whole_model(replace(it.replay, quantization="none"))
    return list(layers(model, it.spec.keep_in_float32).values())


def _square_mask(it: Iteration) -> float:
    return (1 + 1 + 2) * it.replay.rows * _tokens(it) ** 2


def _outlier_search(it: Iteration) -> float:
    return (2 + 1) * it.replay.rows * _tokens(it) * max(layer.in_features for layer in _frozen(it))


def _outlier_columns(it: Iteration) -> float:
    return OUTLIERS * 2 * sum(layer.weight.numel() for layer in _frozen(it))


def _modulations(it: Iteration) -> float:
    model = whole_model(replace(it.replay, quantization="none"))
    return sum(layer.weight.numel() for name, layer in layers(model, ()).items() if name.endswith("_mod.1"))


def _float32_gathers(it: Iteration) -> float:
    weights = weights_of(it.replay)
    gathered = sum(Gathers(it.settings, weights, "backward").most().values())
    return gathered + 2 * max(block.bytes for block in weights.blocks)


def _eager_t5(it: Iteration) -> float:
    tokens = it.settings.text_tokens or it.spec.text_tokens
    return (2 + 2 + 4 + 4) * it.settings.micro_batch * T5_HEADS * tokens**2


def _wide_t5(it: Iteration) -> float:
    return 2 * sum(part.wide for part in it.spec.text_encoders)


EXTRAS = {
    "T5's wo in float32": Extra(
        "two bytes more for each weight of T5's layers named `wo`, as transformers before 5 loads them beside "
        "bitsandbytes' layers in bfloat16, too",
        _wide_t5,
    ),
    "square attention mask": Extra(
        "a mask of all pairs of tokens: as bool, its negation, and as a 16-bit bias (diffusers 0.32)", _square_mask
    ),
    "int8 outlier search": Extra(
        "absolute values in float16 and where they are large, of the widest input of a layer", _outlier_search
    ),
    "int8 outlier columns": Extra(
        f"a 16-bit copy of {100 * OUTLIERS:g} % of all weights; the share is fitted on one row", _outlier_columns
    ),
    "modulations in 16 bits": Extra("a byte more for each weight of the layers named `_mod`", _modulations),
    "float32 gathers": Extra(
        "of gathered blocks and their gradients once more what they take in 16 bits, and of one block what autocast"
        " makes of its weights, and float32 gradients",
        _float32_gathers,
    ),
    "eager T5 attention": Extra(
        "of 64 heads, all pairs of text tokens: biases and scores in 16 bits, scores and their softmax in 32", _eager_t5
    ),
}
