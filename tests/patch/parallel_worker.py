"""One of two gloo processes: FLUX with its blocks' weights split, under every policy, then by tokens.

Started by test_parallel.py.

Usage: parallel_worker.py RANK STORE OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WORLD = 2


def split_by_tokens(model: Any) -> None:
    from diffusers import ContextParallelConfig

    # diffusers numbers devices of an accelerator, which a CPU is not.
    torch.accelerator.device_count = lambda: WORLD
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))


def split_weights(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and this process's part of every gradient."""
    out = model(**inputs, return_dict=False)[0]
    out.square().mean().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"output": out.detach()} | {key: getattr(grad, "_local_tensor", grad) for key, grad in grads.items()}


def by_policy(model: nn.Module, inputs: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    from dancegrpo_fast.activations.checkpointing import FirstBlocks, Keep, apply

    policies = {"none": "none", "full": "full", "attention": "attention", "matmul": "matmul"}
    cases = {name: (policy, False) for name, policy in policies.items()}
    cases |= {"norm": (Keep({"norm", "elementwise"}), False), "first": (FirstBlocks(2), False)}
    cases |= {f"{name} on the host": (name, True) for name in ("full", "attention")}
    found = {}
    for name, (policy, offload) in cases.items():
        undo = apply(model, policy, offload=offload)
        found[name] = trained(model, inputs)
        undo()
    return found


def main(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[2]))
    from dancegrpo_fast import accelerate
    from tests.patch.models import TINY

    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(store, WORLD))
    inputs = TINY["flux"].inputs()
    # Both processes get equally many tokens of each stream.
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :6].contiguous()
    inputs["txt_ids"] = inputs["txt_ids"][:6]
    for kind, split in (("weights", split_weights), ("tokens", split_by_tokens)):
        found = {}
        for name in ("eager", "lossless"):
            model = TINY["flux"].model()
            if name != "eager":
                accelerate(model, name, recompute="all")
            split(model)
            found[name] = trained(model, inputs)
        torch.save(found, f"{output}.{kind}.{rank}")
        if kind == "weights":
            torch.save(by_policy(model, inputs), f"{output}.policies.{rank}")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
