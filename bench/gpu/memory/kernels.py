"""Attention backends of diffusers with and without a mask: whether they run, as which kernel, and in what memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dancegrpo_fast.memory.trace.tracer import trace

from ...rows import Row
from .gauge import of_model

BF16 = torch.bfloat16
# diffusers' name -> the planner's; the unfused formula would hold gigabytes of scores.
BACKENDS = {
    "native": None,
    "_native_flash": "flash",
    "_native_efficient": "efficient",
    "_native_cudnn": "cudnn",
}
# What HunyuanVideo's mask leaves; the others later.
MASKED = ("_native_efficient", "_native_cudnn")
# HunyuanVideo's heads, tokens of 53 x 480 x 640 with the text, and width of a head.
SHAPE = (24, 17_056, 128)
DRY_SHAPE = (2, 40, 16)
TEXT, VALID = 256, 100


class Attention(nn.Module):
    """Queries, keys and values as parameters, so that a call is like a model's."""

    def __init__(self, backend: str, shape: tuple[int, int, int], masked: bool, device: torch.device) -> None:
        super().__init__()
        heads, tokens, width = shape
        self.backend = backend
        options: dict[str, Any] = {"dtype": BF16, "device": device}
        self.streams = nn.ParameterList(nn.Parameter(torch.randn(1, tokens, heads, width, **options)) for _ in range(3))
        mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device)
        # The end of the text is padding.
        mask[..., tokens - min(TEXT - VALID, tokens // 2) :] = False
        self.register_buffer("mask", mask if masked else None)

    def forward(self) -> tuple[Tensor]:
        """`[1, tokens, heads, width]`."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        query, key, value = self.streams
        return (dispatch_attention_fn(query, key, value, attn_mask=self.mask, backend=self.backend),)


def _names(module: nn.Module, device: torch.device) -> list[str]:
    """What runs: on a GPU its kernels, else torch's operators of attention."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as watched:
        output = module()[0]
        output.backward(torch.ones_like(output))
        if on_cuda:
            torch.cuda.synchronize()
    events: Any = watched.profiler
    names = [
        event.name()
        for event in events.kineto_results.events()
        if (event.device_type().name == "CUDA" if on_cuda else "scaled_dot_product" in event.name())
    ]
    return [name for name in dict.fromkeys(names) if not name.startswith(("Memcpy", "Memset"))]


def row(backend: str, masked: bool, device: torch.device) -> Row:
    """One backend; that it does not run is an answer, too."""
    found: Row = {
        "op": "attention memory",
        "attention": backend,
        "masked": masked,
        "runs": False,
    }
    shape = DRY_SHAPE if device.type == "cpu" else SHAPE
    module = Attention(backend, shape, masked, device)
    try:
        taken = of_model(module, {}, device)
        found |= {"runs": True} | taken.columns()
        found["kernels"] = _names(module, device)
    except Exception as error:
        return found | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    kernel = "cpu" if device.type == "cpu" else BACKENDS[backend]
    if kernel is not None:
        # Traced through torch's own dispatch, which is what the planner sees of every backend.
        fake = Attention("native", shape, masked, torch.device("meta"))
        predicted = trace(fake, {}, attention=kernel)
        static = sum(predicted.live("load").values())
        found |= {
            "predicted_peak_bytes": predicted.peak.bytes - static,
            "predicted_saved_bytes": predicted.kept_bytes,
        }
    return found
