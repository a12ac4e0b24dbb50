"""Small real models with inputs, to be run on the CPU."""

from typing import Any

import torch
from torch import nn

from ..models import parts
from ..patch.models import TINY


def _unet(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model = parts.unet(24, block_out_channels=(16, 32), attention_head_dim=2, norm_num_groups=8)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, dtype=dtype),
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 5, 24, dtype=dtype),
    }
    return model.to(dtype), inputs


def tiny(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = _unet(dtype) if family == "unet" else (TINY[family].model(dtype), TINY[family].inputs(dtype))
    return model.train(), inputs | {"return_dict": False}
