"""One of two gloo processes: by each kind of wrapper a rollout step and two updates. Started by test_distributed.py.

Usage: distributed_worker.py RANK WORLD STORE OUTPUT
"""

import sys
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from dancegrpo_fast import policy_loss, transition_step
from dancegrpo_fast.transitions import flow_sde, shifted_sigmas

KINDS = ("ddp", "fsdp")
PER_RANK, SIZE, STEP = 3, 48, 1
TABLE = flow_sde(shifted_sigmas(4, 3.0), 0.7)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.GELU(), torch.nn.Linear(SIZE, SIZE))


def update(model: torch.nn.Module, ranks: list[int], world: int) -> dict[str, Tensor]:
    """Two updates on the samples of `ranks`, one micro-batch each; what the last of them saw."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(world * PER_RANK, SIZE, generator=generator)
    advantages = torch.randn(world * PER_RANK, generator=generator)
    ids = torch.arange(world * PER_RANK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    parts = [slice(rank * PER_RANK, (rank + 1) * PER_RANK) for rank in ranks]
    with torch.no_grad():
        given = ((latents[part], model(latents[part]), ids[part]) for part in parts)
        stepped = [transition_step(x, v, TABLE, STEP, seed=2, sample_ids=own) for x, v, own in given]
    found: dict[str, list[Tensor]] = defaultdict(list)
    for iteration in range(2):
        optimizer.zero_grad()
        for part, step in zip(parts, stepped, strict=True):
            given = (latents[part], model(latents[part]), step.latents, TABLE, STEP, step.log_prob, advantages[part])
            result = policy_loss(*given, clip_range=0.2)
            (result.loss / len(parts)).backward()
            seen = {"ratio": result.ratio, "log_prob": result.log_prob, "loss": result.loss.detach()[None]}
            for name, value in seen.items() if iteration else [("first_ratio", result.ratio)]:
                found[name].append(value)
        optimizer.step()
    return {name: torch.cat(values) for name, values in found.items()}


def whole(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def wrap(kind: str, model: torch.nn.Module, world: int) -> torch.nn.Module:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    rank, world, store, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for kind in KINDS:
        wrapped = wrap(kind, make_model(), world)
        found = update(wrapped, [rank], world)
        weights = {name.removeprefix("module."): whole(p) for name, p in wrapped.named_parameters()}
        torch.save(found | weights, f"{output}.{kind}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
