"""The checkpoint policy that recomputes least, as it is applied."""

from typing import cast

from ...activations import checkpointing
from .iteration import Iteration
from .margins import with_margins
from .settings import GIB


def automatic(iteration: Iteration) -> tuple[checkpointing.Policy, bool, tuple[str, ...]]:
    """The policy for `checkpointing.apply`, whether block inputs wait on the host, and why; the first says what.

    Raises:
        ValueError: nothing fits, with what would.
    """
    gib, picked = iteration.settings.gpu_gib, iteration.pick()
    peak = max(iteration.training(picked.blocks), key=lambda phase: phase.bytes)
    needed = with_margins(iteration.settings, peak.bytes) / GIB
    if needed > gib:
        raise ValueError(
            f"want at least {needed:.2f} for the {peak.name} with as much computed again as can be;"
            " or LoRA, quantization, a smaller micro_batch or size"
        )
    text = f"{picked.name}: the {peak.name} takes {needed:.2f} of {gib:.2f} GiB, as predicted"
    if measured := iteration.settings.measured:
        text += f", at the rates measured on {measured}"
    each = cast(tuple[str | checkpointing.Keep, ...], picked.blocks.policies)
    policy = checkpointing.PerBlock(each) if picked.blocks.kinds else each[0]
    return policy, picked.blocks.host_inputs and set(each) != {"none"}, (text, *picked.reasons)
