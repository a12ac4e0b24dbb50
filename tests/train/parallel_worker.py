"""One of some gloo processes that train tiny runs under DDP and FSDP2. Started by test_parallel.py.

Usage: parallel_worker.py RANK WORLD FOLDER, with the recipes as `FOLDER/cases.json`.
"""

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What FSDP2 calls, by version of torch.
REDUCE_SCATTER = [name for name in ("reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, name)]


@contextmanager
def group(folder: Path, name: str, sharded: bool, rank: int, world: int) -> Iterator[None]:
    """A process group and accelerate's environment, as its launcher leaves them."""
    from accelerate.state import AcceleratorState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    os.environ.update(ACCELERATE_USE_FSDP=str(sharded).lower(), FSDP_VERSION="2")
    store = f"file://{folder}/store-{name}"
    # A process that fails alone must not keep the other one waiting.
    dist.init_process_group("gloo", store, timedelta(seconds=100), rank=rank, world_size=world)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def count_reductions(trainer: Any) -> list[int]:
    """How often gradients are reduced: of DDP's first bucket, or of FSDP2's units that are trained."""
    counts = [0]
    if trainer.processes.sharded:
        claimed: set[torch.nn.Parameter] = set()
        units = 0
        for module in reversed(list(trainer.denoiser.modules())):
            if hasattr(module, "set_requires_gradient_sync"):
                own = {p for p in module.parameters() if p.requires_grad} - claimed
                claimed |= own
                units += bool(own)
        seen = [0]
        for name in REDUCE_SCATTER:
            original = getattr(dist, name)

            def reduce_scatter(*arguments: Any, _original: Any = original, **settings: Any) -> Any:
                seen[0] += 1
                counts[0] = seen[0] // units
                return _original(*arguments, **settings)

            setattr(dist, name, reduce_scatter)
    elif not isinstance(trainer.denoiser, torch.nn.parallel.DistributedDataParallel):
        reduce = trainer.updates.one_pass.reduce

        def reduced(processes: Any) -> bool:
            counts[0] += 1
            return bool(reduce(processes))

        trainer.updates.one_pass.reduce = reduced
    else:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            counts[0] += bucket.index() == 0
            return allreduce_hook(state, bucket)

        trainer.denoiser.register_comm_hook(None, hook)
    return counts


def run(case: dict[str, Any], output: Path) -> dict[str, Any]:
    """One run; what this process saw of it."""
    from dancegrpo_fast.recipe import load_recipe
    from dancegrpo_fast.shards import whole
    from dancegrpo_fast.stopping import Stopped
    from dancegrpo_fast.train.loop import Trainer

    found: dict[str, Any] = {}
    originals = {name: getattr(dist, name) for name in REDUCE_SCATTER}
    try:
        path = output.with_suffix(".json")
        if int(os.environ["RANK"]) == 0:
            path.write_text(json.dumps(case["recipe"] | {"output_dir": str(output)}))
        dist.barrier()
        recipe, _ = load_recipe([str(path)])
        trainer = Trainer(recipe, case.get("resume"))
        counts = count_reductions(trainer)
        kept = []
        collect = trainer.collect

        def watched(*arguments: Any) -> Any:
            batch = collect(*arguments)
            kept.append([list(batch.kept), list(batch.chosen)])
            return batch

        trainer.collect = watched  # type: ignore[assignment]  # as it is called
        end, trainer.accelerator.end_training = trainer.accelerator.end_training, lambda: None
        try:
            trainer.run()
        except Stopped as stopped:
            found["status"] = stopped.status
        found["reductions"], found["kept"] = counts[0], kept
        found["weights"] = {name: whole(p.detach()) for name, p in trainer.parameters.items()}
        found["name"] = trainer.processes.name
        # gloo does not let a process go while another one takes its group down.
        dist.barrier()
        end()
    except ValueError as error:
        found["error"] = str(error)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[2]))
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        # Before the other one gives up, so that a failure says where this one was.
        faulthandler.dump_traceback_later(60)
        with group(folder, name, case["sharded"], rank, world):
            torch.save(run(case, folder / name), folder / f"{name}.{rank}.pt")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except BaseException:
        # The other process may wait for this one in a collective.
        traceback.print_exc()
        os._exit(1)
