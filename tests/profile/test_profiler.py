import gc
import json
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")


from dancegrpo_fast import marks as _phases
from dancegrpo_fast.cli import main
from dancegrpo_fast.memory.planning.budget import CATEGORIES
from dancegrpo_fast.profile import books as _books
from dancegrpo_fast.profile.cuda import Counters
from dancegrpo_fast.profile.predict import planned
from dancegrpo_fast.profile.profiler import Report, phase, profile, profile_recipe
from dancegrpo_fast.recipe import load_recipe
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from ..tolerances import PREDICTED_BYTES
from ..train import tiny

TRAINED = ("text encoding", "rollout", "decode", "rewards", "replay forward", "replay backward", "optimizer")
PREDICTED = ("rollout", "decode", "replay forward", "replay backward", "optimizer")


def recipe_file(base: Path, folder: Path, **changes: Any) -> Path:
    small = {"prompts_per_iteration": 2, "group_size": 3, "micro_batch": 2, "num_steps": 3}
    return tiny.write_recipe(tiny.make_recipe(base, folder / "run", **small | changes), folder / "recipe.yaml")


def check_sums(report: Report) -> None:
    for row in report.rows.values():
        assert set(row.budget) <= set(CATEGORIES)
        assert row.bytes == sum(row.budget.values()) > 0
        assert sum(row.saved_by_group.values()) == row.budget.get("saved", 0)
        assert min(row.budget.values()) >= 0
        shares = [share for share, _ in row.timeline]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
        assert max(sum(budget.values()) for _, budget in row.timeline) == row.bytes
        assert row.budget in [budget for _, budget in row.timeline]


def check_predicted(report: Report) -> None:
    for name in PREDICTED:
        assert report.deviation(name) == pytest.approx(0, abs=PREDICTED_BYTES), (name, report.table())


def second_iteration(trainer: Trainer) -> Report:
    trainer.iteration(1)
    with profile(device="cpu") as report:
        trainer.iteration(2)
    return report


MASTERS: dict[str, Any] = {"dtype": "bfloat16", "master_dtype": "float32"}
LORA = tiny.LoraSettings(rank=2)
RUNS: dict[str, dict[str, Any]] = {
    "full float32": {},
    "full bfloat16, reference model": MASTERS | {"kl_weight": 0.1},
    "full float32 checkpointing": {"checkpointing": "full"},
    "full bfloat16 checkpointing": MASTERS | {"checkpointing": "full"},
    # One model call an update: no gradients are there before it.
    "full float32, one call": {"updates_per_rollout": 3, "timestep_fraction": 0.5},
    "full float32 autocast": {"mixed_precision": "bf16"},
    "lora float32": {"lora": LORA},
    "lora bfloat16, reference without adapters": {"lora": LORA, "dtype": "bfloat16", "kl_weight": 0.1},
    "lora float32 checkpointing": {"lora": LORA, "checkpointing": "full"},
    "lora bfloat16 checkpointing": {"lora": LORA, "checkpointing": "full", "dtype": "bfloat16"},
}


# Of each setting one; autocast is the release's.
FEW = ("full bfloat16, reference model",)


@pytest.mark.parametrize("name", release_but(FEW, RUNS))
def test_rollout_and_replay_are_predicted(flux: Path, tmp_path: Path, name: str) -> None:
    path = recipe_file(flux, tmp_path, shared_noise=False, **RUNS[name])
    report = profile_recipe(path)
    assert set(TRAINED) <= set(report.rows)
    check_sums(report)
    check_predicted(report)
    # The recipe's own folder stays as it was.
    assert not (tmp_path / "run").exists()


def test_command_line(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is measured is no run that anyone is told of.
    monkeypatch.delattr("dancegrpo_fast.train.tracking._started")
    path = recipe_file(flux, tmp_path)
    folder = tmp_path / "figures"
    overrides = ["--train.micro_batch", "2", "--model.compile", "blocks", "--iterations", "1"]
    assert main(["profile", str(path), *overrides, "--figures", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TRAINED)
    assert 'model.compile "blocks" is left out: measured without it' in printed
    drawn = [folder / f"{name}.{kind}" for name in ("timeline", "saved") for kind in ("png", "svg")]
    assert all(str(file) in printed and file.stat().st_size for file in drawn)
    texts = ["".join(e.itertext()) for e in ElementTree.parse(drawn[1]).iter() if e.tag.endswith("}text")]
    assert all(any(text.startswith(name) for text in texts) for name in TRAINED)
    assert "predicted peak" in texts and "not predicted: text encoding, rewards" in texts
    assert sum(text.endswith("%") for text in texts) == len(PREDICTED)
    assert any(text.startswith("peak ") for text in texts)
    assert main(["profile", str(path), "--iterations", "none"]) == 1
    assert "iterations: got none, want a whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    usage = capsys.readouterr().out
    assert "dancegrpo-fast profile" in usage and "--iterations" in usage and "--figures" in usage


def test_on_a_gpu_the_planner_predicts(flux: Path, tmp_path: Path) -> None:
    """Asked for on the CPU, whose attention differs; what rests does not."""
    changes = MASTERS | {"checkpointing": "full", "memory_gib": 24.0, "shared_noise": False}
    recipe, _ = load_recipe([str(recipe_file(flux, tmp_path, **changes))])
    trainer = Trainer(recipe)
    report = second_iteration(trainer)
    report.predicted, notes = planned(trainer)
    assert set(PREDICTED) <= set(report.predicted)
    assert "rewards" not in report.predicted and any(recipe.rewards[0].name in note for note in notes)
    for name in ("parameters", "optimizer", "master weights", "gradients"):
        # Models of other tests may still be there.
        there = report.rows["replay forward"].budget[name] - report.before.get(name, 0)
        own = report.predicted["replay forward"][name]
        assert own == pytest.approx(there if name == "gradients" else _own(trainer, name), rel=PREDICTED_BYTES)
    assert trainer.recipe.model.dtype == "bfloat16"


def _own(trainer: Trainer, name: str) -> int:
    if name == "parameters":
        return sum(p.nbytes for p in trainer.denoiser.parameters())
    if name == "master weights":
        return sum(w.nbytes for w in trainer.optimizer.weights.values() if w.dtype == torch.float32)
    return sum(t.nbytes for state in trainer.optimizer.torch.state.values() for t in state.values())


def test_without_a_planner_there_is_a_reason(flux: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_recipe([str(recipe_file(flux, tmp_path))])[0])
    budgets, [note] = planned(trainer)
    assert not budgets and "float32" in note


@pytest.mark.release
def test_a_unet_with_shared_first_steps_is_predicted(diffusion: Path, tmp_path: Path) -> None:
    report = profile_recipe(recipe_file(diffusion, tmp_path))
    check_predicted(report)
    # Every float32 operator of this run returns what it allocates, but for attention's and convolution's buffers.
    rollout = report.rows["rollout"]
    assert rollout.allocator == pytest.approx(rollout.bytes, rel=PREDICTED_BYTES)
    assert "CPU allocator" in report.table()


@pytest.mark.release
def test_what_a_trainer_keeps_where(flux: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny.make_recipe(flux, tmp_path / "run", checkpointing="full", shared_noise=False))
    report = second_iteration(trainer)
    parameters, state = _own(trainer, "parameters"), _own(trainer, "optimizer")
    vae: Any = trainer.model
    forward, backward = report.rows["replay forward"].budget, report.rows["replay backward"].budget
    # Models of other tests may still be there.
    for budget in (forward, backward):
        assert budget["parameters"] >= parameters and budget["gradients"] >= parameters
        assert budget["optimizer"] >= state and budget["block inputs"] > 0
        assert budget["other models"] >= sum(p.nbytes for p in vae.vae.parameters())
    assert backward["recomputation"] > 0 and "recomputation" not in forward
    rollout = report.rows["rollout"].budget
    assert "gradients" not in rollout or rollout["gradients"] < parameters
    batch, steps = 12, len(trainer.table)
    latents = 4 * batch * (steps + 1) * torch.Size(trainer.model.latent_shape).numel()
    assert rollout["trajectories"] - report.before["trajectories"] >= latents
    assert "saved" not in rollout and report.rows["rollout"].module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_code_without_marks_has_its_backward_and_its_step_apart() -> None:
    model, x = Net(), torch.ones(512, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    with profile(device="cpu") as report:
        step(model, optimizer, x)
        assert phase("x") is not _phases.UNMARKED
        with report.phase("second"):
            step(model, optimizer, x)
    check_sums(report)
    assert list(report.rows) == ["other", "backward", "optimizer", "second"]
    assert report.rows["backward"].pieces == report.rows["optimizer"].pieces == 2
    weights = sum(p.nbytes for p in model.parameters())
    # Each tanh keeps its result for its own backward, and the last layer for its weight's: one storage.
    assert report.rows["second"].saved_by_group["activation"] == 512 * 256 * 4
    heights = [sum(budget.values()) for _, budget in report.rows["backward"].timeline]
    assert len(set(heights)) > 3 and max(heights) == report.rows["backward"].bytes
    assert report.rows["second"].budget["optimizer"] - report.before.get("optimizer", 0) == 2 * weights + 4 * 4
    assert report.rows["backward"].budget["gradients"] - report.before.get("gradients", 0) <= weights
    assert report.peak.bytes == max(row.bytes for row in report.rows.values())


def test_long_runs_forget_what_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []
    # Other tests' tensors are alive too, and books are as long as twice those.
    monkeypatch.setattr(_books.Books, "census", lambda self: None)
    for limit in (10, 100_000):
        monkeypatch.setattr(_books, "COMPACT", limit)
        gc.collect()
        with profile(device="cpu") as report, report.phase("rollout"):
            x = torch.zeros(1000)
            for _ in range(2000):
                y = x + 1
                x = torch.cat([x, x])[:1000] + y
            books: Any = _phases.running[0]
            kept = len(books.books.storages)
        row = report.rows["rollout"]
        assert _books.MOMENTS / 2 <= len(row.timeline) <= _books.MOMENTS
        heights = [sum(budget.values()) for _, budget in row.timeline]
        totals.append((row.bytes, row.op, heights, kept))
        del x, y
    assert totals[0][:3] == totals[1][:3]
    assert totals[0][3] < totals[1][3]


def hooks() -> tuple[Any, ...]:
    return (
        torch.autograd.backward,
        checkpoint._checkpoint_without_reentrant_generator,
        len(module_hooks._global_forward_pre_hooks),
        len(module_hooks._global_forward_hooks),
        len(optimizer_hooks._global_optimizer_pre_hooks),
        len(optimizer_hooks._global_optimizer_post_hooks),
        len(_get_current_dispatch_mode_stack()),
        len(_phases.running),
    )


class FailingStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # never returns
        raise KeyError("no step")


@pytest.mark.parametrize("place", release_but(("step",), ["body", "phase", "forward", "step"]))
def test_an_exception_leaves_no_hooks_behind(place: str) -> None:
    model, before = Net(), hooks()
    with pytest.raises((KeyError, RuntimeError)), profile(device="cpu", allocator=True) as report:
        assert hooks() != before
        if place == "forward":
            model(torch.ones(1, 3))
        if place == "step":
            step(model, FailingStep(model.parameters(), 0.1), torch.ones(1, 64))
        with report.phase("rollout"):
            if place == "phase":
                raise KeyError(place)
        raise KeyError(place)
    assert hooks() == before
    # And the next one works.
    with profile(device="cpu") as again:
        model(torch.ones(1, 64))
    assert list(again.rows) == ["other"] and again.rows["other"].op
    assert hooks() == before


def test_a_profile_inside_another_is_refused() -> None:
    with profile(device="cpu"):
        with pytest.raises(RuntimeError, match="profile: got one inside another, want one at a time"), profile():
            pass
        assert len(_phases.running) == 1
    assert not _phases.running


def test_marks_cost_nothing_without_a_profile() -> None:
    def work() -> int:
        return 1

    assert phase("rollout") is phase("decode") is _phases.UNMARKED
    assert phase("rollout")(work) is work
    with phase("rollout"):
        pass


def test_a_plan_is_compared_and_shown() -> None:
    planned = types.SimpleNamespace(
        phases=[types.SimpleNamespace(name="rollout", budget={"parameters": 4 * 2**20, "temporaries": 2**20})]
    )
    with profile(planned, device="cpu") as report, report.phase("rollout"):
        torch.zeros(2**20)
    assert report.predicted == {"rollout": {"parameters": 4 * 2**20, "temporaries": 2**20}}
    row = report.rows["rollout"]
    assert report.deviation("rollout") == 5 * 2**20 / row.bytes - 1
    assert report.deviation("other") is None
    lines = {line.split("  ")[0]: line for line in report.table().splitlines()}
    assert "5.000" in lines["rollout"] and f"{report.deviation('rollout'):+.1%}" in lines["rollout"]
    assert "predicted" in lines["phase"] and "aten.zeros" in lines["rollout"]
    plain = json.loads(json.dumps(report.as_dict()))
    found = {one["name"]: one for one in plain["phases"]}
    assert found["rollout"]["bytes"] == row.bytes and found["other"]["predicted"] is None


def test_bad_arguments_are_named() -> None:
    for arguments, message in (
        ({"device": "meta"}, 'device: got "meta", want cpu or cuda'),
        ({"device": "cpu", "snapshot": True}, "snapshot: got True on cpu, want a profile of cuda"),
        ({"device": "cuda", "allocator": True}, "allocator: got True on cuda, want a profile of cpu"),
    ):
        with pytest.raises(ValueError, match=message), profile(**arguments):  # type: ignore[arg-type]  # on purpose
            pass
    with pytest.raises(ValueError, match="iterations: got 0, want at least 1"):
        profile_recipe("recipe.yaml", 0)
    with pytest.raises(ValueError, match="report: got one before its profile ended"):
        Report("cpu").table()


class FakeCuda:
    """Stands for torch.cuda's counters where there is no GPU; says which were read, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.blocks: list[dict[str, Any]] = []
        answers = {
            "synchronize": None,
            "reset_peak_memory_stats": None,
            "max_memory_allocated": 3 * 2**30,
            "max_memory_reserved": 4 * 2**30,
            "current_device": 0,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, self._function(name, answer))
        segments = {"segments": [{"device": 0, "blocks": self.blocks}, {"device": 1, "blocks": [{}]}]}
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", self._function("snapshot", segments))

    def _function(self, name: str, answer: Any) -> Any:
        def call(*_: Any) -> Any:
            self.calls.append(name)
            return answer

        return call


def test_cuda_counters_are_read_at_phase_boundaries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for torch.cuda."""
    fake = FakeCuda(monkeypatch)
    with profile(device="cuda") as report, report.phase("rollout"):
        inside = len(fake.calls)
        torch.zeros(3)
        assert len(fake.calls) == inside
    begins = ["synchronize", "reset_peak_memory_stats"]
    ends = ["synchronize", "max_memory_allocated", "max_memory_reserved"]
    # "other", "rollout", "other".
    assert fake.calls == (begins + ends) * 3
    row = report.rows["rollout"]
    assert (row.allocated, row.reserved, row.allocator) == (3 * 2**30, 4 * 2**30, None)


def test_cuda_blocks_are_told_apart_by_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for torch.cuda."""
    fake = FakeCuda(monkeypatch)
    fake.blocks += [
        {"address": 512, "size": 100, "state": "active_allocated"},
        {"address": 1024, "size": 30, "state": "active_allocated"},
        {"address": 2048, "size": 7, "state": "inactive"},
    ]
    found = Counters(torch.device("cuda"), snapshot=True).stop(lambda: {512: "saved"})
    assert found.resident == {"saved": 100, "workspace": 30}


def test_living_storages_are_known_by_address() -> None:
    x = torch.ones(5)
    with profile(device="cpu"):
        y = x + 1
        profiler: Any = _phases.running[0]
        with phase("next"):
            found = profiler.books.addresses()
    assert found[x.data_ptr()] == found[y.data_ptr()] == "trajectories"
