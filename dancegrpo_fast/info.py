"""`python -m dancegrpo_fast.info`: versions, backends, and why one is unavailable."""

import os
import platform
from importlib import metadata

from . import __version__, backends

PACKAGES = (
    "numpy",
    "triton",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "flash-attn",
    "xformers",
)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """The report as text."""
    import torch

    cuda = torch.version.cuda or "none (CPU build)"
    lines = [
        f"dancegrpo_fast {__version__}",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} processors, {torch.get_num_threads()} torch threads",
        f"torch {torch.__version__}, CUDA {cuda}",
        *(f"{package} {_version(package)}" for package in PACKAGES),
        "",
        *(f"{b.name:10} {'available' if b.available else 'unavailable':12} {b.detail}" for b in backends.available()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the report."""
    print(describe())


if __name__ == "__main__":
    main()
