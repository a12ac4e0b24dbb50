"""Benchmarks: `python -m bench` from the repository root; the method is in README.md."""

import re


def slug(name: str) -> str:
    """A device's name in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
