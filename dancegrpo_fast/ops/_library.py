"""`torch.ops.dgf`: how an op is defined."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dgf", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines one op for the CPU and CUDA; `fake` gives the shapes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CPU")
    _LIBRARY.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"dgf::{name}", fake, lib=_LIBRARY)
