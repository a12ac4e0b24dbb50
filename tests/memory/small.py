"""Small real models with inputs, to be run on the CPU."""

from typing import Any

import pytest
import torch
from torch import nn

from ..patch.models import TINY

diffusers = pytest.importorskip("diffusers")


def _unet(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
        layers_per_block=1,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, dtype=dtype),
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 5, 24, dtype=dtype),
    }
    return model.to(dtype), inputs


def tiny(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = _unet(dtype) if family == "unet" else (TINY[family].model(dtype), TINY[family].inputs(dtype))
    return model.train(), inputs | {"return_dict": False}
