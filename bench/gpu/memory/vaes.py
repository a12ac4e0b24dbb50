"""Untiled decodes of real VAEs: predicted, allocated and reserved."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.trace.tracer import trace

from ...rows import Row
from .gauge import of_model
from .models import off

BF16 = torch.bfloat16
TINY = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}


class Decoder(nn.Module):
    """A VAE whose call is its decode."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> tuple[Tensor]:
        """Samples of latents `[rows, channels, (frames,) height, width]`."""
        (decoded,) = self.vae.decode(z, return_dict=False)
        return (decoded,)


@dataclass(frozen=True)
class Case:
    """One decode: a shipped model, frames, height, width and rows."""

    name: str
    shipped: str
    frames: int
    height: int
    width: int
    rows: int
    seconds: float = 6.0

    @property
    def label(self) -> str:
        """For messages."""
        return f"decode, {self.name}, {self.rows} x {self.frames} x {self.height} x {self.width}, untiled"


CASES = (Case("FLUX.1-dev", "flux-dev", 1, 1024, 1024, 4), Case("HunyuanVideo", "hunyuan-video", 53, 480, 640, 1))


def row(case: Case, device: torch.device) -> Row:
    """Predicted without weights, then measured with random ones."""
    dry = device.type == "cpu"
    spec = specs.resolve(case.shipped)
    if dry:
        spec = replace(spec, vae_config=spec.vae_config | TINY)
    size = (1, 32, 32) if dry else (case.frames, case.height, case.width)
    grid = specs.latent_grid(spec, *size)
    shape = (1 if dry else case.rows, spec.latent_channels, *(grid if spec.is_video else grid[1:]))
    fake: Any = specs.build_vae(spec)
    z = torch.empty(shape, device="meta", dtype=BF16)
    found = trace(
        fake, {"z": z, "return_dict": False}, train=False, call=fake.decode, attention="cpu" if dry else "flash"
    )
    predicted = found.peak_of("rollout")
    parameters = predicted.by_category.get("parameters", 0)
    vae = fake.to_empty(device=device)
    with torch.no_grad():
        for value in (*vae.parameters(), *vae.buffers()):
            value.normal_(0.0, 0.02)
    z = torch.randn(shape, device=device).to(BF16)
    taken = of_model(Decoder(vae), {"z": z}, device, train=False)
    # The input is there before.
    beside = sum(predicted.by_category.values()) - parameters - z.nbytes
    return {
        "op": "decode memory",
        "model": case.name,
        "sample": f"{case.rows} x {case.frames} x {case.height} x {case.width}",
        "predicted_peak_bytes": beside,
        **taken.columns(),
        "peak_off": off(beside, taken.peak),
        "predicted_at": f"{predicted.op} in {predicted.module}",
    }
