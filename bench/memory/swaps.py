"""Small cards: how many blocks `auto` swaps there, and what that costs, beside the same run without."""

from collections.abc import Iterator
from typing import Any

from dancegrpo_fast.memory.planning.cards import card
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.planner import Plan, on_cards
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.verdict import shortened

from ..rows import Row, grid, made_with

CARDS = ("4070", "4070-ti-super", "4090")
WEIGHTS = {"none": "bfloat16", "nf4": "nf4"}
# Nothing that is not running is on the device, and texts were encoded elsewhere.
_GIVEN: dict[str, Any] = {"lora": 32, "offload": ("denoiser", "vae"), "text_encoders": "precomputed"}
_GIVEN |= {"vae_tiling": "on"}
MODELS: dict[str, dict[str, Any]] = {
    "FLUX 720 x 720": {"model": "flux-dev", "height": 720, "width": 720},
    "HunyuanVideo 53 x 480 x 640": {"model": "hunyuan-video", "frames": 53, "height": 480, "width": 640},
}


def rows(where: Row, only: str = "") -> Iterator[Row]:
    """Of every model whose name contains `only`, on every card, with weights as they are and quantised."""
    for name, model in MODELS.items():
        for quantization in WEIGHTS if only in name else ():
            settings = Settings(**model, **_GIVEN, quantization=quantization)
            without, swapped = (on_cards(settings.changed(blocks_to_swap=n), CARDS) for n in (0, "auto"))
            for wanted in CARDS:
                yield {
                    "op": "swap",
                    "name": name,
                    "card": card(wanted).label,
                    "gib": card(wanted).gib,
                    "quantization": quantization,
                    "without": _answer(without[wanted]),
                    "swapped": _answer(swapped[wanted]),
                    "environment": where,
                }


def _answer(found: Plan) -> Row:
    return {
        "blocks_to_swap": found.settings.blocks_to_swap,
        "host_bytes": sum(Iteration(found.settings).rest.swap.host),
        "checkpointing": found.policy,
        "peak_bytes": found.peak_bytes,
        "total_bytes": found.total_bytes,
        "fits": found.fits(found.settings.gpu_gib),
        "seconds": found.seconds,
    }


def markdown(found: list[Row]) -> str:
    """One line a run."""
    lines = []
    for row in found:
        without, swapped = row["without"], row["swapped"]
        missing = without["total_bytes"] / GIB - row["gib"]
        lines.append(
            [
                f"{row['name']}, {WEIGHTS[row['quantization']]}",
                f"{row['card']}, {row['gib']:.1f}",
                f"{without['seconds']:.0f} s" if without["fits"] else f"{missing:.1f} GiB are missing",
                swapped["blocks_to_swap"],
                f"{swapped['host_bytes'] / GIB:.1f}",
                f"{swapped['peak_bytes'] / GIB:.1f} / {swapped['total_bytes'] / GIB:.1f}",
                f"{swapped['seconds']:.0f} s" if swapped["fits"] else "does not fit",
                shortened(swapped["checkpointing"]),
            ]
        )
    head = [
        "LoRA 32",
        "card, GiB",
        "without",
        "blocks",
        "on the host",
        "exact / with margins",
        "an iteration",
        "policy",
    ]
    return "\n".join(
        [
            "# Blocks that swap on small cards",
            "",
            "Made by `python -m bench.memory --only swaps`; predicted, on no GPU. GiB = 2^30. `blocks_to_swap` and",
            "`checkpointing` are `auto`; denoiser and VAE wait on the host while they do not run, the VAE decodes in",
            "tiles, texts were encoded elsewhere; 12 samples of 16 steps, 60 % of them trained, bfloat16, batch 1.",
            "Seconds are counted work over the card's assumed rates, its link to the host among them.",
            made_with(found[0]),
            "",
            *grid(head, lines),
            "",
        ]
    )
