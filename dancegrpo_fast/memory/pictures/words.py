"""What pictures say of a plan in words: the run, its policy, and whether it fits."""

from collections import Counter
from pathlib import Path

from ..planning.cards import CARDS
from ..planning.planner import Plan
from ..planning.settings import GIB, Settings
from ..planning.verdict import GUESSES, HOST, YES, state


def subject(settings: Settings, *, size: bool = True, trained: bool = True) -> str:
    """The run in a line; with its size, and what is trained on how many GPUs."""
    s = settings
    what = f"LoRA {s.lora}" if s.lora else "full fine-tuning"
    base = f" on an {s.quantization} base" if s.quantization != "none" else ""
    shared = f"FSDP {s.strategy.replace('_', ' ')} over {s.fsdp} GPUs" if s.is_sharded else f"{s.fsdp} GPUs"
    parts = [
        Path(s.model).name,
        f"{s.frames} frames" if size and s.frames > 1 else "",
        f"{s.height} x {s.width}" if size else "",
        f"CFG {s.guidance_scale:g}" if s.guidance_scale != 1 else "",
        what + base if trained else "",
        s.dtypes,
        shared if trained and s.fsdp > 1 else "",
        "rollout replica" if trained and s.rollout_replica else "",
        f"{s.blocks_to_swap} blocks swapped" if s.blocks_to_swap and trained else "",
        f"{s.sequence_parallel} GPUs a sample" if s.sequence_parallel > 1 and trained else "",
        f"block ops {s.block_ops}" if s.block_ops != "off" else "",
        "VAE in tiles" if s.vae_tiling == "on" else "",
        s.optimizer.replace("_", " ") if s.optimizer != "adamw" else "",
        "on the host: " + " + ".join(what.replace("_", " ").replace("vae", "VAE") for what in s.offload)
        if s.offload
        else "",
    ]
    return ", ".join(part for part in parts if part)


def margins(plan: Plan) -> float:
    """GiB."""
    return sum(plan.margins.values()) / GIB


def given(settings: Settings) -> str:
    """The card, or the memory, that is planned for."""
    return CARDS[settings.card].label if settings.card else f"{settings.gpu_gib:g} GiB"


def capacity(gib: float, settings: Settings) -> str:
    """A card's memory by its name, or the number."""
    if gib == settings.gpu_gib:
        return given(settings)
    return next((f"{card.size} card" for card in CARDS.values() if card.gib == gib), f"{gib:g} GiB")


def verdict(plan: Plan) -> str:
    """Whether it fits what was given."""
    s = plan.settings
    spare = s.gpu_gib - plan.total_bytes / GIB
    found = state(plan.peak_bytes, plan.total_bytes, s.gpu_gib)
    if found == YES:
        return f"fits the {given(s)} with {spare:.1f} GiB to spare"
    if found == GUESSES:
        return f"in the shaded margin of the {given(s)}: within the guesses, {-spare:.1f} GiB short"
    return f"does not fit the {given(s)}: {-spare:.1f} GiB are missing"


def in_a_word(policy: str, swapped: int | str = 0) -> str:
    """What most blocks have of a policy, with how many of how many, and what waits on the host."""
    name, host, _ = policy.partition(HOST)
    counts: Counter[str] = Counter()
    for run in name.split(", "):
        count, times, kept = run.partition(" x ")
        counts[kept or run] += int(count) if times else 1
    [(most, of_it)] = counts.most_common(1)
    share = f" {of_it}/{counts.total()}" if len(counts) > 1 else ""
    return f"{most}{share}{' + host' if host else ''}{' + swap' if swapped else ''}"
