"""CUDA's caching allocator, told what to do before it hands anything out."""

import os
import sys

import torch

# Where a user tells it something.
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expand_segments(device: torch.device) -> str:
    """Lets the allocator's segments grow, so that it reserves less beside what is in use.

    Nothing is changed where the environment tells the allocator something, and where segments cannot grow: on Windows,
    under ROCm, on other devices than CUDA's.

    Returns:
        What was done, in a line, or "" on another device.
    """
    if device.type != "cuda":
        return ""
    if said := asked():
        return f"allocator: as {said} says"
    if not can_expand():
        return "allocator: segments cannot expand here"
    # torch 2.9 renamed it.
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    tell("expandable_segments:True")
    return f"allocator: expandable segments ({SETTINGS[1]}=expandable_segments:False for none)"


def expands(device: torch.device) -> bool:
    """Whether segments grow after `expand_segments`; of a device that is only planned for, they do."""
    if device.type != "cuda":
        return True
    said = asked()
    return "expandable_segments:True" in said if said else can_expand()


def asked() -> str:
    """What the environment tells the allocator, as NAME=value, or ""."""
    return next((f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)), "")


def can_expand() -> bool:
    """Whether CUDA's allocator knows segments that grow."""
    return sys.platform != "win32" and torch.version.hip is None
