"""Plain torch definition: GELU in its tanh form, written behind a prefix that is copied."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_tanh(x: Tensor, prefix: Tensor | None, out: Tensor) -> None:
    """Writes `[prefix, gelu(x)]` along the last dimension; torch's own kernel, whose bits are eager's everywhere."""
    width = 0 if prefix is None else prefix.shape[-1]
    if prefix is not None:
        out[..., :width].copy_(prefix)
    if x.is_cuda or prefix is None:
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out[..., width:])
    else:
        # On a CPU the ends of strided rows are computed by other instructions, to other bits.
        out[..., width:].copy_(F.gelu(x, approximate="tanh"))


def gelu_tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient by x, given the gradient of `gelu(x)`."""
    result: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return result.contiguous()


def definition(x: Tensor, prefix: Tensor | None) -> Tensor:
    """The same as one differentiable expression."""
    y = F.gelu(x, approximate="tanh")
    return y if prefix is None else torch.cat([prefix, y], dim=-1)
