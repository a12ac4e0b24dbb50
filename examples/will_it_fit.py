"""The memory planner as a library: would this run fit this card, and what would make it fit?

    python examples/will_it_fit.py                                             # FLUX.1-dev, LoRA, 24 GiB
    python examples/will_it_fit.py --model wan21-1.3b --frames 33 --gpu 16

Every phase of an iteration is predicted from the real model classes on fake tensors: no GPU, no weights, no download.
"""

import argparse

from dancegrpo_fast import memory

parser = argparse.ArgumentParser(description="Predicts the memory of a GRPO iteration with LoRA of rank 32.")
parser.add_argument("--model", default="flux-dev", help="a shipped name; `dancegrpo-fast memory --help` lists them")
parser.add_argument("--frames", type=int, default=1)
parser.add_argument("--size", type=int, default=512, help="height and width, in pixels")
parser.add_argument("--gpu", type=float, default=24, help="GiB")
given = parser.parse_args()

settings = memory.Settings(
    given.model, frames=given.frames, height=given.size, width=given.size, lora=32, gpu_gib=given.gpu
)
for name, changes in {
    "bfloat16, everything kept": {"checkpointing": "none"},
    "every block recomputed": {"checkpointing": "full"},
    "frozen weights in nf4": {"checkpointing": "none", "quantization": "nf4"},
    "nf4, every block recomputed": {"checkpointing": "full", "quantization": "nf4"},
}.items():
    found = memory.plan(settings.changed(**changes), advise=False)
    fits = "fits" if found.fits(given.gpu) else "does not fit"
    most = f"{found.total_bytes / 2**30:5.1f} GiB with margins, most in {found.peak.name}"
    print(f"{name:28} {most}: {fits} {given.gpu:g} GiB")
