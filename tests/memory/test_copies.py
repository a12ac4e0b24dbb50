"""What stands beside one denoiser: a KL's model, an average, encoders in fewer bits, states by name, a reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast import optimizers
from dancegrpo_fast.memory.planning import cases, copies, sharding, specs
from dancegrpo_fast.memory.planning.planner import Iteration
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.recipe import TrainSettings

from .pipelines import asked, wan22

pytest.importorskip("diffusers")


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    return wan22(tmp_path / "wan")


def test_copies_are_as_large_as_what_is_trained(wan: Path) -> None:
    def found(**more: Any) -> tuple[float, int]:
        settings = asked(wan, **more)
        case = cases.case_of(settings, 1, "flash", train=True)
        return copies.copies(settings, case, 2), sharding.weights_of(case).trainable

    held, trained = found(lora=0, kl_reference=True)
    assert 2 * 2 * trained < held < 2 * 4 * trained  # in bfloat16, and what Wan keeps in float32
    assert found(lora=0, ema=True) == (2 * 4 * trained, trained)
    assert found(lora=0, ema=True, fsdp=2) == (4 * trained, trained)
    assert found(lora=0, ema=True, second_expert="frozen") == (4 * trained, trained)
    # Of the KL's model the frozen one is a copy, too.
    assert found(lora=0, kl_reference=True, second_expert="frozen")[0] == held
    # As wide in shards as alone, whatever they are gathered in.
    masters: dict[str, Any] = {"lora": 0, "kl_reference": True, "dtype": "float32", "mixed_precision": "bf16"}
    assert 2 * found(**masters, fsdp=2)[0] == found(**masters)[0] == 2 * 4 * trained
    layers = found(ema=True)
    assert layers[0] == 2 * 4 * layers[1] < held
    # LoRA layers are switched off for it.
    assert found(kl_reference=True)[0] == 0


def test_encoders_and_vae_are_as_wide_as_asked(wan: Path) -> None:
    plain, wide, narrow = (
        Iteration(asked(wan, **more))
        for more in ({}, {"frozen_dtype": "float32"}, {"text_encoder_quantization": "nf4"})
    )
    assert (plain.encoders, wide.encoders) == (2 * 432, 4 * 432)
    assert narrow.encoders == 256 * 9 // 16 + 2 * (432 - 256)
    assert plain.decode is not None and wide.decode is not None
    assert wide.decode.weights == 2 * plain.decode.weights
    assert any("linear layers in nf4" in reason for reason in narrow.reasons)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("prodigy", 8),
        *(
            pytest.param(*case, marks=pytest.mark.release)
            for case in (("adafactor", 0), ("lion", 2), ("torch.optim:AdamW", 4), ("torch.optim:SGD", 0))
        ),
    ],
)
def test_states_of_optimisers_by_name(wan: Path, name: str, each: int) -> None:
    settings = asked(wan, optimizer=name, lora_dtype="bfloat16")
    assert sharding.state_bytes(settings, torch.bfloat16) == each
    assert sharding.state_bytes(settings, torch.float32) == 2 * each
    iteration = Iteration(settings)
    trained = sharding.weights_of(iteration.replay).trainable
    assert sum(iteration.rest.optimizer.values()) == 2 * each * trained
    assert f"optimizer {name}: {each} bytes of states for each trained number" in " ".join(iteration.reasons)


@pytest.mark.parametrize(("name", "module"), [("lion", "lion_pytorch:Lion"), ("prodigy", "prodigyopt:Prodigy")])
def test_states_of_packages_are_what_they_keep(name: str, module: str) -> None:
    pytest.importorskip(module.partition(":")[0])
    kept = optimizers.probe(TrainSettings(1, 1, 2, 1, optimizer=module), torch.bfloat16)
    assert kept.bytes_per_number == 2 * sharding.STATES[name]


def test_a_probe_counts_flat_states_and_those_of_weights_that_are_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Prodigy's: a flat tensor, and a copy of the weights that is a number where these are zero."""

    class Flat(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p] = {
                        "s": p.detach().flatten().clone(),
                        "p0": p.detach().clone() if p.any() else p.sum(),
                    }

    monkeypatch.setattr(optimizers, "find_optimizer", lambda name: Flat)
    kept = optimizers.probe(TrainSettings(1, 1, 2, 1, optimizer="some:Flat"))
    assert (kept.bytes_per_number, kept.others) == (8, ["s"])


def test_unknown_optimisers_are_refused(wan: Path) -> None:
    with pytest.raises(ValueError, match=r'optimizer: got "adam", want one of adamw, .*, module:Class'):
        asked(wan, optimizer="adam")
    with pytest.raises(ValueError, match=r'optimizer: got "no.such:Thing", which does not import'):
        Iteration(asked(wan, optimizer="no.such:Thing"))


def test_a_reference_has_its_tokens_in_every_call() -> None:
    flux, qwen = specs.resolve("black-forest-labs/FLUX.1-Kontext-dev"), specs.resolve("Qwen/Qwen-Image-Edit")
    size, reference = (1, 1024, 768), (512, 1024)
    assert specs.tokens(flux, *size, reference) == 3072 + 2048
    given = specs.inputs(flux, *size, reference=reference)
    assert given["hidden_states"].shape[1] == given["img_ids"].shape[0] == 3072 + 2048
    assert specs.inputs(qwen, *size, reference=reference)["img_shapes"] == [[(1, 64, 48), (1, 32, 64)]]
    settings = Settings("flux-dev", *size, reference_height=512, reference_width=1024)
    assert cases.case_of(settings, 1, "flash", train=True).reference == reference


@pytest.mark.parametrize(
    ("model", "reference", "message"),
    [
        ("wan21-1.3b", (512, 512), "reference_height: got 512 for wan21-1.3b, want 0"),
        ("flux-dev", (512, 500), "reference_width: got 500, want a multiple of 16"),
    ],
)
def test_references_that_cannot_be_are_refused(model: str, reference: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs.inputs(specs.resolve(model), 1, 512, 512, reference=reference)


def test_half_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference_height: got 512 with reference_width 0, want both"):
        Settings("flux-dev", reference_height=512)
