"""Small models whose prompts have unequal lengths, and what torch's attention is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from .models import TINY, Inputs

BF16, F32 = torch.bfloat16, torch.float32
MASKS = {"hunyuan": "encoder_attention_mask", "qwen": "encoder_hidden_states_mask"}
# Of a batch of three; the text has room for seven.
LENGTHS = (5, 3, 7)


def mask_of(name: str) -> str:
    return MASKS[name.split()[0].replace("skyreels", "hunyuan")]


def made(name: str, lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = F32) -> tuple[Any, Inputs]:
    inputs = TINY[name].inputs(dtype, len(lengths))
    inputs[mask_of(name)] = (torch.arange(7) < torch.tensor(lengths)[:, None]).to(inputs[mask_of(name)].dtype)
    return TINY[name].model(dtype), inputs


def output(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs, return_dict=False)[0].detach()


def rows(inputs: Inputs, index: list[int]) -> Inputs:
    """Some rows of every input."""
    return {k: v[index] if isinstance(v, Tensor) else [v[i] for i in index] for k, v in inputs.items()}


@contextmanager
def masks_seen(calls: int) -> Iterator[list[Tensor | None]]:
    """What torch's attention is given, but for the refiner's."""
    seen: list[Tensor | None] = []
    original = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("attn_mask"))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        yield seen
    del seen[:-calls]
