"""Model FLOP utilisation: what is counted at the start, against all arithmetic of an iteration."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast.train import Trainer
from dancegrpo_fast.train.speed import flops_of_a_row, peak_flops

from .tiny import LoraSettings, make_recipe

PEAK = 1e12


def of_the_denoiser(counter: FlopCounterMode) -> int:
    return counter.get_total_flops() - sum(counter.get_flop_counts().get("Decoder", {}).values())


def test_attention_that_is_not_counted_is_not_claimed(flux: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run"))
    conditioning = trainer.residence.encode(trainer.prompts)
    assert flops_of_a_row(trainer.policy, trainer.table, conditioning) is None and trainer.speed.row is None


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=1, alpha=1)], ids=["full", "lora"])
def test_utilisation_is_of_the_arithmetic_that_is_done(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraSettings | None
) -> None:
    monkeypatch.setattr("dancegrpo_fast.train.setup.peak_flops", lambda *_: PEAK)
    # torch does not count the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer = Trainer(make_recipe(flux, tmp_path / "run", lora=lora, timestep_fraction=1.0))
        assert trainer.speed.row is not None
        begun = of_the_denoiser(counter)
        row = trainer.iteration(1)
    counted = row["speed"]["mfu"] * PEAK * sum(row["seconds"].values())
    # Attention takes 5 products backward for its 2, and LoRA layers a little of their own.
    done = of_the_denoiser(counter) - begun
    assert 0.95 * done < counted < done
    assert row["speed"]["samples_per_second"] == pytest.approx(12 / sum(row["seconds"].values()))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_or_not(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wanted) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    recipe = make_recipe(flux, tmp_path / "run", mixed_precision="bf16")
    assert peak_flops(recipe, torch.device("cuda")) == wanted
    assert peak_flops(recipe, torch.device("cpu")) is None
    assert peak_flops(make_recipe(flux, tmp_path / "run"), torch.device("cuda")) is None
