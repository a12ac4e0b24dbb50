"""One of two gloo processes that load families under FSDP2 and train one iteration. Started by test_loading.py.

Usage: loading_worker.py FOLDER RANK, with recipes as `FOLDER/<name>.json`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def tensors(denoiser: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())


def run(recipe_file: Path) -> dict[str, Any]:
    """Where the tensors are before they are handed out, and what they are afterwards."""
    from dancegrpo_fast.processes import Processes
    from dancegrpo_fast.recipe import load_recipe
    from dancegrpo_fast.shards import whole
    from dancegrpo_fast.train.loop import Trainer

    found: dict[str, Any] = {}
    prepare = Processes.prepare

    def watched(self: Processes, denoiser: nn.Module) -> nn.Module:
        found["empty"] = {name for name, value in tensors(denoiser).items() if value.is_meta}
        return prepare(self, denoiser)

    Processes.prepare = watched  # type: ignore[method-assign]
    trainer = Trainer(load_recipe([str(recipe_file)])[0])
    Processes.prepare = prepare  # type: ignore[method-assign]
    found["tensors"] = {name: whole(value.detach()).clone() for name, value in tensors(trainer.model.denoiser).items()}
    found["row"] = trainer.iteration(1)
    return found


def main(folder: Path, rank: str) -> None:
    from tests.train.parallel_worker import group

    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.json")):
        with group(folder, file.stem, True, int(rank), 2):
            torch.save(run(file), folder / f"{file.stem}.{rank}")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    main(Path(sys.argv[1]), sys.argv[2])
