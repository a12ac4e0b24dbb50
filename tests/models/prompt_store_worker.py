"""One of two gloo processes that write one prompt store. Started by test_prompt_store.py.

Usage: prompt_store_worker.py STORE MEETING NAME
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dancegrpo_fast.models import prompt_store
from dancegrpo_fast.models.prompt_store import PromptStore, given_identity

Encode = Callable[[str], dict[str, torch.Tensor]]


def load() -> Encode:
    print("load", flush=True)

    def encode(text: str) -> dict[str, torch.Tensor]:
        print(text, flush=True)
        return {"embeds": torch.zeros(1, 1)}

    return encode


def main(folder: str, meeting: str, name: str) -> None:
    from accelerate import PartialState

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    state = PartialState(cpu=True)
    prompt_store.SEEN_AFTER = 1
    store = PromptStore(Path(folder), given_identity("flux"))
    store.encode(["x", "y", "x", "z"], load)
    # What is there already is shared out too, and nobody loads anything for one prompt but the one that encodes it.
    store.encode(["z", "w", "x"], load)
    assert not store.missing(["w", "x", "y", "z"])
    try:
        PromptStore(Path(f"{folder}-{name}"), given_identity("flux")).encode(["x", "y"], load)
    except ValueError as error:
        print(error, flush=True)
    # From here on both write at once: a shard of the same texts, and one of their own.
    for number in range(20):
        store.add([f"{number} both", f"{number} too"], {"embeds": torch.full((2, 1), float(number))})
        store.add([f"{number} {name}"], {"embeds": torch.full((1, 1), float(number))})
    state.wait_for_everyone()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
