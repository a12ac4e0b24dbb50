"""What the optimiser trains: precision, and what it keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.optimizers import make_optimizer, probe
from dancegrpo_fast.recipe import TrainSettings
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train import Trainer

from ..release import release_but
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


class Odd(torch.optim.Optimizer):
    """Keeps all that others keep: numbers, narrow and other shapes, and what it learns of all tensors."""

    def __init__(self, params: Any, lr: float = 1.0, scale: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "scale": scale, "seen": 0, "longest": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"count": 0, "rate": 0.1, "mean": torch.zeros_like(p, dtype=torch.bfloat16)}
                    state |= {"norms": torch.zeros(3, 5), "sign": torch.zeros_like(p, dtype=torch.uint8)}
                state["count"] += 1
                state["rate"] *= 1.1
                state["mean"].lerp_(p.grad.bfloat16(), 0.5)
                state["norms"] += p.grad.norm()
                state["sign"].copy_(p.grad > 0)
                group["longest"] = max(group["longest"], float(p.grad.norm()) / 3)
                way = state["mean"].float() * state["rate"] + state["sign"].float() * state["norms"].mean()
                p.sub_(way * group["lr"] / (state["count"] + group["seen"] + group["longest"]))


class Listing(torch.optim.SGD):
    """Keeps a list."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [1]


HERE = f"{Odd.__module__}:"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer_args": {"betas": [0.5, 0.7], "eps": 1e-5}},
    "torch.optim:SGD": {"optimizer_args": {"momentum": 0.9}},
    "torch.optim:Adafactor": {},
    f"{HERE}Odd": {"weight_decay": 0.0},
}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(iterations=1, prompts_per_iteration=1, group_size=2, micro_batch=1, **changes)


def last(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint.load(checkpoint.complete(run / "checkpoints")[-1])[0]


def assert_resumes(base: Path, folder: Path, **changes: Any) -> None:
    """Two iterations at once are two, with a checkpoint between them."""
    changes |= {"updates_per_rollout": 2, "ema_decay": 0.5}
    Trainer(make_recipe(base, folder / "whole", **changes)).run()
    for iterations in (1, 2):
        Trainer(make_recipe(base, folder / "cut", iterations=iterations, **changes), resume="auto").run()
    whole, cut = last(folder / "whole"), last(folder / "cut")
    for group in ("model", "optimizer", "ema"):
        assert whole[group].keys() == cut[group].keys()
        for name, value in whole[group].items():
            assert value.dtype == cut[group][name].dtype and torch.equal(value, cut[group][name]), name


@pytest.mark.parametrize("name", release_but(("torch.optim:SGD", f"{HERE}Odd"), OPTIMIZERS))
def test_any_optimiser_is_resumed(flux: Path, tmp_path: Path, name: str) -> None:
    assert_resumes(flux, tmp_path, optimizer=name, lora=LoraSettings(rank=2, alpha=2), **OPTIMIZERS[name])


def test_arguments_reach_the_optimiser() -> None:
    train = settings(learning_rate=0.1, weight_decay=0.2, optimizer_args={"betas": [0.5, 0.6], "eps": 1e-3})
    (group,) = make_optimizer(train, [torch.nn.Parameter(torch.ones(2))]).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.1, 0.2, (0.5, 0.6), 1e-3)
    assert probe(train).bytes_per_number == 8
    odd = probe(settings(optimizer=f"{HERE}Odd", weight_decay=0.0))
    assert (odd.bytes_per_number, odd.others, odd.numbers["count"]) == (2 + 1, ["norms"], int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, r'train\.optimizer: got "adam", want adamw, adamw8bit or module:Class'),
        ({"optimizer": "no_such.place:Lion"}, r'train\.optimizer: got "no_such.place:Lion", which does not import'),
        ({"optimizer": "torch.optim:Optimism"}, r"train\.optimizer: got .*, want a torch\.optim\.Optimizer"),
        ({"optimizer": "torch.optim:LBFGS", "weight_decay": 0.0}, r"train\.optimizer: got .*LBFGS.*does not step"),
        ({"optimizer": "torch.optim:Rprop"}, r"train\.weight_decay: got 0.0001 for .*Rprop.*, want 0"),
        ({"optimizer": f"{HERE}Listing"}, r"train\.optimizer: .* state history is list, want tensors and numbers"),
        ({"optimizer_args": {"beta": 0.9}}, r'train\.optimizer_args: got beta for "adamw", want some of betas, eps'),
        ({"optimizer_args": {"lr": 0.9}}, r"train\.optimizer_args: got lr, want train\.learning_rate for it"),
        (
            {"optimizer_args": {"betas": [2, 0.9]}},
            r'train\.optimizer: got "adamw" with .*, which refuses: Invalid beta',
        ),
    ],
)
def test_bad_optimisers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(settings(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks where no GPU is")
def test_eight_bit_states_want_a_gpu(flux: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(flux, tmp_path / "run", optimizer="adamw8bit", lora=LoraSettings(rank=64))
    with pytest.raises(ValueError, match=r'train\.optimizer: got "adamw8bit" on a CPU, want a GPU, or adamw'):
        Trainer(recipe)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_eight_bit_states_are_resumed(flux: Path, tmp_path: Path) -> None:
    assert_resumes(flux, tmp_path, optimizer="adamw8bit", lora=LoraSettings(rank=64))
    large = {name: t.dtype for name, t in last(tmp_path / "whole")["optimizer"].items() if name.endswith("/state1")}
    assert torch.uint8 in large.values()


def test_masters_move_weights_that_steps_would_leave(flux: Path, tmp_path: Path) -> None:
    """All weights in bfloat16 at 1e-5: each is the rounding of its master, and every master moves."""
    with pytest.raises(ValueError, match=r'model\.dtype: got "bfloat16" without model\.lora, .*want float32 with'):
        Trainer(make_recipe(flux, tmp_path / "none", dtype="bfloat16"))
    options: dict[str, Any] = {"dtype": "bfloat16", "master_dtype": "float32", "learning_rate": 1e-5}
    trainer = Trainer(make_recipe(flux, tmp_path / "run", updates_per_rollout=4, ema_decay=0.5, **options))
    before = {name: weight.detach().clone() for name, weight in trainer.optimizer.weights.items()}
    assert trainer.iteration(1)["ratio_first_update_max_dev"] == 0.0
    for name, parameter in trainer.parameters.items():
        master = trainer.optimizer.weights[name]
        assert (parameter.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(parameter, master.bfloat16())
        # What no pair of this model's calls looks at has no gradient.
        state = trainer.optimizer.torch.state[master]
        assert state["exp_avg"].dtype == torch.float32
        assert not torch.equal(master, before[name]) or not state["exp_avg"].any()
        assert trainer.average is not None and trainer.average.values[name].dtype == torch.float32
    assert_resumes(flux, tmp_path, **options)
    assert {value.dtype for value in last(tmp_path / "whole")["model"].values()} == {torch.float32}
    for changes in ({}, {"dtype": "bfloat16", "lora": LoraSettings(rank=2)}):
        with pytest.raises(ValueError, match=r'train\.master_dtype: got "float32" for .* that are float32, want null'):
            make_recipe(flux, tmp_path / "none", master_dtype="float32", **changes).check_trained()
