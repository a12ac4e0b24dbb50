"""How fast an iteration was: samples a second, and the share of the GPU's arithmetic that the model's calls used."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models import Conditioning
from ..recipe import Recipe
from ..transitions import TransitionTable
from .calls import Policy, probe

# Dense TFLOP/s in 16 bits of NVIDIA's data sheets, by words of the device's name; the first whose words are all there.
PEAKS = (("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("A100", 312), ("L40S", 362), ("L4", 121))


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """FLOP/s of a device; None where it is not known, or the model does not compute in 16 bits."""
    narrow = recipe.train.mixed_precision == "bf16" or recipe.model.dtype != "float32"
    if device.type != "cuda" or not narrow:
        return None
    words = set(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    return next((peak * 1e12 for name, peak in PEAKS if words >= set(name.split())), None)


@torch.no_grad()
def flops_of_a_row(policy: Policy, table: TransitionTable, conditioning: Conditioning) -> float | None:
    """Of a forward pass with its guidance; None where torch does not see the attention: another package's kernel."""
    with FlopCounterMode(display=False) as counter:
        policy(policy.model.denoiser, *probe(policy, table, conditioning))
    seen = re.search("scaled_dot_product|bmm", str(counter.get_flop_counts()["Global"]))
    return counter.get_total_flops() / policy.rows if seen else None


@dataclass(frozen=True)
class Speed:
    """Of the iterations of a run.

    Attributes:
        steps: of the sampler.
        shared: the first of them, whose model calls the samples of a prompt share.
        row: `flops_of_a_row`.
        peak: FLOP/s of all processes.
    """

    recipe: Recipe
    steps: int
    shared: int
    row: float | None
    peak: float | None

    def of(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """The `speed` of a row of `metrics.jsonl`, from its `seconds` and `skipped`.

        What counts is what the objective needs: no padding, nothing computed again, no decode and no reward. A backward
        takes twice its forward, and half of that where only LoRA layers have gradients of weights.
        """
        train, seconds = self.recipe.train, sum(metrics["seconds"].values())
        prompts, samples = train.prompts_per_iteration, train.prompts_per_iteration * train.group_size
        used = None
        if self.row is not None and self.peak is not None:
            passes = (3 if self.recipe.model.lora is None else 2) + (train.kl_weight > 0)
            skipped = metrics["skipped"]
            replayed = skipped["model_rows"] - skipped["padded_rows"]
            rows = self.shared * prompts + (self.steps - self.shared) * samples + passes * replayed
            # Their forward is the rollout's.
            rows += (passes - 1) * skipped["one_pass_rows"]
            used = rows * self.row / (seconds * self.peak)
        return {"samples_per_second": samples / seconds, "mfu": used}
