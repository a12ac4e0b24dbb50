"""Gloo processes of which two share every sample's tokens: the ratio is 1, and what is learned is one process's."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.recipe import EvaluationSettings

from ..models import cases, folders, parts
from ..release import release_but
from . import test_parallel as parallel
from . import tiny
from .test_parallel import Alone
from .tiny import reward

pytestmark = [parallel.GLOO, pytest.mark.long]

WORLD = 4
SMALL: dict[str, Any] = {"prompts_per_iteration": 2, "group_size": 4, "num_steps": 3, "iterations": 1}
EVALUATION: dict[str, Any] = {"samples_per_prompt": 2, "grid_samples": 2}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": (
        "flux",
        {
            "iterations": 2,
            "updates_per_rollout": 2,
            "ema_decay": 0.5,
            "evaluation": EvaluationSettings(rewards=[reward("Brightness")], **EVALUATION),
        },
    ),
    # Text of six tokens, of which a mask hides some; LoRA layers, whose reference is the denoiser without them.
    "lora": ("hunyuan_video", {"lora": True, "kl_weight": 0.1, "checkpointing": "full"}),
}
# Of a release: other families, a reference model of its own, samples that are dropped or not trained on.
RELEASE: dict[str, tuple[str, dict[str, Any]]] = {
    "skyreels": ("skyreels_i2v", {}),
    "kl": ("qwen_image", {"kl_weight": 0.1, "gradient_sync": "call", "block_ops": "lossless"}),
    "wan": ("wan", {"checkpointing": "attention"}),
    "kontext": ("flux_kontext", {"block_ops": "lossless", "reference_height": 24, "reference_width": 24}),
    "edit": ("qwen_image_edit", {"lora": True}),
    "uneven": ("flux", {"prompts_per_iteration": 3, "group_size": 3, "best_of_n": 1, "timestep_fraction": 1.0}),
    "dropped": ("flux", {"group_size": 5, "rewards": [reward("Refusing", on_error="drop", max_dropped=0.9)]}),
    "win_rate": ("flux", {"rewards": [reward("Brightness", win_rate=True)]}),
}
EVERY = SETTINGS | RELEASE
# Without and with what the planner is asked for, which each process traces.
AUTOCAST: dict[str, dict[str, Any]] = {
    "bf16": {"mixed_precision": "bf16"},
    "planned": {"mixed_precision": "bf16", "attention": "auto", "checkpointing": "auto", "memory_gib": 4.0},
}
# FSDP2 has every setting, DDP what is asked of a group's gradients.
BOTH = ("ddp", "fsdp")
KINDS = release_but(("fsdp",), BOTH)
CASES = release_but(
    ("even ddp", *(f"{name} fsdp" for name in SETTINGS)), [f"{name} {kind}" for name in EVERY for kind in BOTH]
)


def recipe(bases: Path, output: Path, family: str, **changes: Any) -> Any:
    base, folder = bases / family / "base", output.parent / "prompts" / output.name
    if not base.is_dir():
        folders.BUILDERS[family](base)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = SMALL | {"micro_batch": 2, "output_dir": str(output)}
    return cases.make_recipe(cases.CASES[family], base, folder / "run", **fixed | changes)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> list[str]:
    """Tests of this file that run."""
    return [item.name for item in request.session.items if item.path == request.path]


@pytest.fixture(scope="module")
def wanted(chosen: list[str]) -> dict[str, list[str]]:
    """By kind, names of the settings that they look at."""

    def looked_at(name: str, kind: str) -> bool:
        ids = [f"[{name} {kind}]", *([f"[{kind}]"] if name == "even" else [])]
        return any(one in test for one in ids for test in chosen)

    return {kind: [name for name in EVERY if looked_at(name, kind)] for kind in BOTH}


@pytest.fixture(scope="module")
def runs(
    bases: Path, chosen: list[str], wanted: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of all runs of two groups of two processes."""
    folder, made = tmp_path_factory.mktemp("together"), {}

    def add(name: str, sharded: bool, case: str, resume: str | None = None, **changes: Any) -> None:
        family, settings = EVERY[case]
        given = settings | {"sequence_parallel": 2} | changes
        made[name] = sharded, recipe(bases, folder / name, family, **given), resume

    for kind, sharded in (("ddp", False), ("fsdp", True)):
        for name in wanted[kind]:
            add(f"{kind}-{name}", sharded, name)
        for name, changes in AUTOCAST.items():
            if any(f"[{name} {kind}]" in test for test in chosen):
                add(f"{kind}-{name}", sharded, "lora", lora=False, kl_weight=0.0, **changes)
        if any(f"[{kind}]" in test for test in chosen):
            add(f"{kind}-resumed", sharded, "even", str(folder / f"{kind}-even" / "checkpoints" / "000001"))
    return parallel.run_together(folder, made, WORLD)


@pytest.fixture(scope="module")
def alone(bases: Path, wanted: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    given = {name: EVERY[name] for names in wanted.values() for name in names}
    return parallel.run_alone({n: recipe(bases, folder / n, family, **more) for n, (family, more) in given.items()})


@pytest.mark.parametrize("case", CASES)
def test_groups_of_processes_train_as_one(runs: Path, alone: Alone, case: str) -> None:
    """Weights, gradient norms, rewards and counts; the ratio of the first update is 1 to the bit."""
    name, kind = case.split()
    processes = f"4 processes ({'FSDP2' if kind == 'fsdp' else 'DDP'}, 2 a sample by ulysses)"
    parallel.assert_trained_as_one(runs, alone, kind, name, processes)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_divided_between_groups(runs: Path, kind: str) -> None:
    ranks = [torch.load(runs / f"{kind}-even.{rank}.pt", weights_only=True)["kept"] for rank in range(WORLD)]
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    for (first, chosen), (second, _) in zip(ranks[0], ranks[2], strict=True):
        assert chosen == [*first, *second] == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_are_those_of_one_process(runs: Path, alone: Alone, kind: str) -> None:
    # Products of fewer rows are rounded otherwise on some CPUs.
    parallel.assert_same_evaluations(runs, alone, kind, exact=0)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_end_with_the_same_bits(runs: Path, kind: str) -> None:
    parallel.test_resumed_runs_end_with_the_same_bits(runs, kind)


@pytest.mark.parametrize("case", release_but(("bf16 fsdp",), [f"{name} {kind}" for name in AUTOCAST for kind in BOTH]))
def test_the_ratio_is_one_under_autocast(runs: Path, case: str) -> None:
    name, kind = case.split()
    (row,) = parallel.rows(runs / f"{kind}-{name}")
    assert row["ratio_first_update_max_dev"] == 0.0 and row["grad_norm"] > 0.0
    weights = [torch.load(runs / f"{kind}-{name}.{rank}.pt", weights_only=True)["weights"] for rank in range(WORLD)]
    for other in weights[1:]:
        parallel.assert_same_bits(weights[0], other)


@pytest.mark.release
def test_blocks_that_stream_change_no_bit(tmp_path: Path) -> None:
    """FLUX of two double and four single blocks; LoRA's frozen weights of some wait on the host."""
    base = tiny.make_flux(tmp_path / "base", text_tokens=4)
    torch.manual_seed(0)
    deep: Any = parts.randomised(parts.flux_transformer(16, num_layers=2, num_single_layers=4))
    deep.save_pretrained(base / "transformer")
    given = SMALL | {"micro_batch": 2, "lora": tiny.LoraSettings(rank=2, alpha=2), "checkpointing": "attention"}
    counts = {"whole": 0, "swapped": 3}
    made = {
        name: tiny.make_recipe(base, tmp_path / name, sequence_parallel=2, blocks_to_swap=count, **given)
        for name, count in counts.items()
    }
    parallel.run_together(tmp_path, {name: (False, one, None) for name, one in made.items()})
    whole, swapped = (parallel.newest(tmp_path / name)["model"] for name in counts)
    parallel.assert_same_bits(whole, swapped)
    assert [row["ratio_first_update_max_dev"] for row in parallel.rows(tmp_path / "swapped")] == [0.0]


@pytest.mark.release
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_stops_all_and_a_judge_that_fails_none(bases: Path, tmp_path: Path, kind: str) -> None:
    """A member has the signal; the judge fails where it is asked, in the first of the second group."""
    signalled = {"call": 2, "number": signal.SIGTERM, "mark": str(tmp_path / "signalled")}
    failing = {"call": 1, "number": 0, "mark": str(tmp_path / "failed"), "rank": 2}
    family, settings = SETTINGS["even"]
    judged = EvaluationSettings(rewards=[reward("Interrupted", args=failing, label="Brightness")], **EVALUATION)
    given = settings | {"sequence_parallel": 2, "rewards": [reward("Interrupted", args=signalled)]}
    stopped = recipe(bases, tmp_path / "stopped", family, **given)
    first = str(tmp_path / "stopped" / "checkpoints" / "000001")
    continued = recipe(bases, tmp_path / "continued", family, **given | {"evaluation": judged})
    sharded = kind == "fsdp"
    made = {"stopped": (sharded, stopped, None), "continued": (sharded, continued, first)}
    parallel.run_together(tmp_path, made, WORLD)
    found = [torch.load(tmp_path / f"stopped.{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert [rank["status"] for rank in found] == [128 + signal.SIGTERM] * WORLD
    assert [row["iteration"] for row in parallel.rows(tmp_path / "stopped")] == [1]
    assert (tmp_path / "continued" / "model").is_dir()
    # The first evaluation that is judged is left out.
    assert [row["sampler"] for row in parallel.rows(tmp_path / "continued", "evaluations")] == ["sde"]
