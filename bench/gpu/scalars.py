"""How a device multiplies a 0-dim float32 scalar with a bfloat16 tensor: whether it rounds the scalar first."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BF16 = torch.bfloat16
AS_IT_IS, ROUNDED, NEITHER = "the scalar as it is", "the scalar rounded to bfloat16", "neither"


def _rounding(product: Tensor, scalar: Tensor, tensor: Tensor) -> str:
    wide, value = tensor.cpu().float(), scalar.cpu()
    for name, factor in ((AS_IT_IS, value), (ROUNDED, value.to(BF16).float())):
        if torch.equal(product.cpu(), (wide * factor).to(BF16)):
            return name
    return NEITHER


def scalar_orders(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for a scalar on the host and on the device, each before and behind `*`."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(4096, generator=generator).to(BF16).to(device)
    for place in ("on the host", "on the device"):
        scalar = torch.tensor(0.7).to("cpu" if place == "on the host" else device)
        for order, product in (("scalar * tensor", scalar * tensor), ("tensor * scalar", tensor * scalar)):
            yield {
                "op": "scalar order",
                "scalar": place,
                "order": order,
                "device": device.type,
                "rounding": _rounding(product, scalar, tensor) if product.dtype == BF16 else str(product.dtype),
            }
