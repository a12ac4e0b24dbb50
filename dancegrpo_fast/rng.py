"""Every random choice is a function of the run's seed and what it is for, so that a resumed run repeats it."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from the run's seed and names or numbers of what is drawn."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
