"""What the optimiser trains: precision, and what it keeps."""

from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast.train import Trainer

from .tiny import LoraSettings, make_recipe


def moved(trainer: Trainer, iterations: int) -> dict[str, float]:
    """The share of the entries of LoRA's A and B that are others after the iterations."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    for iteration in range(1, iterations + 1):
        assert trainer.iteration(iteration)["ratio_first_update_max_dev"] == 0.0
    found = {}
    for side in ("lora_A", "lora_B"):
        changed = [(p != before[name]).flatten() for name, p in trainer.parameters.items() if side in name]
        found[side] = float(torch.cat(changed).float().mean())
    return found


def test_lora_moves_on_a_bfloat16_base_as_on_a_float32_one(flux: Path, tmp_path: Path) -> None:
    """`pytest -s` prints the shares: 30 updates of 1e-4; "rounded" is with layers and states in bfloat16, too."""
    shares = {}
    for name in ("float32", "bfloat16", "rounded"):
        options: dict[str, Any] = {"lora": LoraSettings(rank=32, alpha=32), "updates_per_rollout": 10}
        dtype = "float32" if name == "float32" else "bfloat16"
        trainer = Trainer(make_recipe(flux, tmp_path / name, learning_rate=1e-4, dtype=dtype, **options))
        assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
        if name == "rounded":
            for parameter in trainer.parameters.values():
                parameter.data = parameter.data.bfloat16()
        shares[name] = moved(trainer, 3)
        print(f"LoRA of {name}: unchanged {[f'{1 - share:.1%}' for share in shares[name].values()]} of A and B")
    assert shares["bfloat16"] == shares["float32"] == {"lora_A": 1.0, "lora_B": 1.0}
    assert shares["rounded"]["lora_A"] < 1.0
