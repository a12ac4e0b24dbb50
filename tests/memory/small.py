"""Small real models with inputs, to be run on the CPU, and calls that are planned."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dancegrpo_fast.memory.planning.budget import Phase
from dancegrpo_fast.memory.planning.cases import Case
from dancegrpo_fast.memory.planning.planner import Plan

from ..activations.policies import MODELS

FLUX = {"model": "flux-dev", "height": 256, "width": 256, "attention": "flash"}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def case_of(
    model: str | Path, size: int = 64, frames: int = 1, lora: int = 0, lora_dtype: str = "fp32", kernel: str = "flash"
) -> Case:
    """A call in training of one sample."""
    targets = TARGETS if lora else ()
    return Case(str(model), frames, size, size, 1, None, "bf16", lora, targets, lora_dtype, kernel, "off", "gelu", True)


def tiny(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    return MODELS[family].model(dtype).train(), MODELS[family].inputs(dtype) | {"return_dict": False}


def phase_of(found: Plan, name: str) -> Phase:
    return next(phase for phase in found.phases if phase.name == name)
