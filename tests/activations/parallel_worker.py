"""One of two gloo processes: FLUX with its blocks' weights split, under every policy.

Started by test_checkpointing_parallel.py.

Usage: parallel_worker.py RANK STORE OUTPUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2


def main(rank: int, store: str, output: str) -> None:
    sys.path.append(str(Path(__file__).parents[2]))
    from dancegrpo_fast import accelerate
    from dancegrpo_fast.activations.checkpointing import FirstBlocks, Keep, apply
    from tests.patch.models import TINY
    from tests.patch.parallel_worker import split_weights

    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(store, WORLD))
    inputs = TINY["flux"].inputs()
    model = TINY["flux"].model()
    accelerate(model, "lossless", recompute="all")
    split_weights(model)
    cases = {
        "none": ("none", False),
        "full": ("full", False),
        "attention": ("attention", False),
        "matmul": ("matmul", False),
        "norm": (Keep({"norm", "elementwise"}), False),
        "first": (FirstBlocks(2), False),
        "full on the host": ("full", True),
        "attention on the host": ("attention", True),
    }
    found = {}
    for name, (policy, offload) in cases.items():
        undo = apply(model, policy, offload=offload)
        out = model(**inputs, return_dict=False)[0]
        out.square().mean().backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"output": out.detach()} | {key: grad.to_local().clone() for key, grad in grads.items()}
        model.zero_grad()
        undo()
    torch.save(found, f"{output}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
