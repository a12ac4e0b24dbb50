"""Training calls of real models, or of their first blocks at real width: predicted and measured."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.trace.tracer import trace

from ...memory.families import FAMILIES, prepare, real, real_inputs
from ...rows import Row
from .gauge import of_model

BF16 = torch.bfloat16
# Attention as the planner names it -> what makes torch take it.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Sizes = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Model:
    """A shipped model with other numbers of blocks, the call's sizes, and its stand-in of a dry run."""

    name: str
    shipped: str
    blocks: dict[str, int]
    sizes: Sizes
    stand_in: str
    lora: int = 0

    def spec(self, dry: bool) -> tuple[specs.Spec, Sizes]:
        """What is built, and frames, height, width, rows and text tokens of the call."""
        spec = specs.resolve(self.shipped)
        if dry:
            family = next(f for f in FAMILIES if f.name == self.stand_in)
            return replace(spec, config=spec.config | family.config | self.blocks), family.sizes
        return replace(spec, config=spec.config | self.blocks), self.sizes


@dataclass(frozen=True)
class Case:
    """One row."""

    model: Model
    kernel: str
    policy: str = "none"
    patch: str = "off"
    seconds: float = 10.0

    @property
    def label(self) -> str:
        """For messages."""
        return f"memory, {self.model.name}, {self.kernel}, {self.policy}, block ops {self.patch}"


HUNYUAN = Model(
    "HunyuanVideo, a double and a single block, 53 x 480 x 640",
    "hunyuan-video",
    {"num_layers": 1, "num_single_layers": 1},
    (53, 480, 640, 1, 256),
    "HunyuanVideo",
)
FLUX = Model(
    "FLUX.1-dev LoRA 32, two double and two single blocks, 720 x 720",
    "flux-dev",
    {"num_layers": 2, "num_single_layers": 2},
    (1, 720, 720, 1, 512),
    "FLUX",
    lora=32,
)
SD = Model("Stable Diffusion 1.4, 8 x 512 x 512", "sd14", {}, (1, 512, 512, 8, 77), "SD UNet")
# Its mask keeps HunyuanVideo from flash attention.
FIRST = (Case(FLUX, "flash"), Case(FLUX, "flash", "full"), Case(SD, "flash"))
LATER = (
    Case(HUNYUAN, "efficient"),
    Case(HUNYUAN, "efficient", "full"),
    Case(HUNYUAN, "efficient", patch="lossless, gelu"),
    Case(HUNYUAN, "cudnn"),
    Case(FLUX, "cudnn"),
    Case(SD, "flash", "full"),
    Case(FLUX, "flash", patch="fast, all"),
)


@contextlib.contextmanager
def _attention(kernel: str) -> Iterator[None]:
    with contextlib.nullcontext() if kernel == "cpu" else sdpa_kernel(BACKENDS[kernel]):
        yield


def off(predicted: int, measured: int) -> float | None:
    """How far a prediction lies above what was measured, as a share of it."""
    return round(predicted / measured - 1, 6) if measured else None


def row(case: Case, device: torch.device) -> Row:
    """Predicted without weights, then measured with them."""
    dry = device.type == "cpu"
    spec, sizes = case.model.spec(dry)
    kernel = "cpu" if dry else case.kernel
    lora, rank = (BF16, case.model.lora) if case.model.lora else (None, 0)
    fake = prepare(specs.build(spec, BF16), lora, case.patch, rank)
    model = prepare(real(spec, BF16, device), lora, case.patch, rank)
    for each in (fake, model):
        checkpointing.apply(each, case.policy)
    found = trace(fake, specs.inputs(spec, *sizes), attention=kernel)
    static = sum(found.live("load").values())
    with _attention(kernel):
        taken = of_model(model, real_inputs(spec, sizes, BF16, device), device)
    predicted = found.peak.bytes - static
    return {
        "op": "memory",
        "model": case.model.name,
        "attention": case.kernel,
        "policy": case.policy,
        "patch": case.patch,
        "static_bytes": static,
        "predicted_peak_bytes": predicted,
        **taken.columns(),
        "peak_off": off(predicted, taken.peak),
        "predicted_saved_bytes": found.kept_bytes,
        "saved_off": off(found.kept_bytes, taken.saved),
        "predicted_at": f"{found.peak.op} in {found.peak.module}",
    }
