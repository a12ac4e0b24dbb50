"""Plain torch definition: a linear layer and its LoRA update, operation by operation as peft has them."""

from torch import Tensor
from torch.nn import functional as F


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """`x W^T + b + scale (x A^T) B^T` in x's dtype, the update in that of A and B."""
    base = F.linear(x, weight, bias)
    update = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b)
    return (base + update * scale).to(base.dtype)
