"""Two gloo processes, DDP and FSDP2, through the one trainer: the samples, updates and files of one process."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dancegrpo_fast.processes import Processes, share
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer

from ..models import checks, lora_files
from ..processes import together
from ..tolerances import REORDERED_SUMS, assert_same_training
from .tiny import EvaluationSettings, LoraSettings, make_recipe, reward

WORKER = Path(__file__).with_name("parallel_worker.py")
WORLD = 2
GLOO = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
pytestmark = [GLOO, pytest.mark.long]

SETTINGS: dict[str, dict[str, Any]] = {
    # Whole prompts on each process.
    "even": {
        "prompts_per_iteration": 2,
        "updates_per_rollout": 2,
        "ema_decay": 0.5,
        "evaluation": EvaluationSettings(samples_per_prompt=2, grid_samples=2, rewards=[reward("Brightness")]),
    },
    # 9 samples, of which the middle prompt's are split; of the six trained on, any number may be on a process.
    "uneven": {"group_size": 3, "best_of_n": 1, "window": [1, 2], "iterations": 1, "timestep_fraction": 1.0},
    # Samples are dropped in either process, of the prompt that they share, too.
    "dropped": {"rewards": [reward("Refusing", on_error="drop", max_dropped=0.9)], "group_size": 5, "iterations": 1},
    # The second process has no gradient.
    "lonely": {"prompts_per_iteration": 2, "rewards": [reward("FirstGroup")]},
    "lora": {
        "prompts_per_iteration": 2,
        "lora": LoraSettings(rank=2, alpha=2),
        "kl_weight": 0.1,
        "checkpointing": "full",
    },
    # A reference model of its own, and gradients that are reduced in every call.
    "kl": {"prompts_per_iteration": 2, "kl_weight": 0.1, "gradient_sync": "call"},
}
# Under DDP alone: gradients of the rollout's own calls. A sample's are dropped in either process, and one has none.
ONE_PASS: dict[str, dict[str, Any]] = {
    "retain": SETTINGS["dropped"] | {"passes": "retain"},
    "reweight": SETTINGS["lonely"] | {"passes": "reweight", "lora": LoraSettings(rank=2, alpha=2)},
}
# From a LoRA file.
STARTED: dict[str, dict[str, Any]] = {
    "adapter": {"lora": LoraSettings(rank=2, alpha=6, target_modules=lora_files.TARGETS), "kl_weight": 0.1},
    "merged": {"iterations": 1},
}
# DDP is handed its samples as FSDP2 is: those that are divided in other ways are a release's, as are LoRA files.
OF_RELEASE = {"ddp": ("uneven", "dropped", "lonely", *STARTED), "fsdp": tuple(STARTED)}
KINDS = tuple(OF_RELEASE)
BF16: dict[str, Any] = {"prompts_per_iteration": 2, "mixed_precision": "bf16", "iterations": 1}


def each_kind(*names: str) -> list[Any]:
    """These settings under DDP and FSDP2, but for the release's."""
    return [
        pytest.param(name, kind, marks=[pytest.mark.release] if name in OF_RELEASE[kind] else [])
        for name in names
        for kind in KINDS
    ]


def recipe(base: Path, output: Path, **changes: Any) -> Any:
    return make_recipe(base, output, **{"micro_batch": 2} | changes)


def run_together(folder: Path, cases: dict[str, tuple[bool, Any, str | None]], world: int = WORLD) -> Path:
    """Runs of some processes: whether they are sharded, the recipe, and what is resumed."""
    whole: dict[str, Any] = {}
    for name, (sharded, recipe, resume) in cases.items():
        made = recipe.as_dict()
        for one in (*made["rewards"], *(made["evaluation"] or {"rewards": []})["rewards"]):
            one["name"] = "tests.train.tiny:" + one["name"].rpartition(":")[2]
        whole[name] = {"sharded": sharded, "recipe": made, "resume": resume}
    (folder / "cases.json").write_text(json.dumps(whole))
    together([[str(WORKER), str(rank), str(world), str(folder)] for rank in range(world)], folder, scripts=True)
    return folder


Alone = dict[str, tuple[Path, dict[str, Any], dict[str, Any]]]


def run_alone(recipes: dict[str, Any]) -> Alone:
    """Where one process ran each recipe, its weights before and after."""
    from accelerate.state import AcceleratorState

    found = {}
    for name, made in recipes.items():
        trainer = Trainer(made)
        before = {key: p.detach().clone() for key, p in trainer.parameters.items()}
        trainer.run()
        after = {key: p.detach().clone() for key, p in trainer.parameters.items()}
        found[name] = Path(made.output_dir), before, after
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.fixture(scope="module")
def runs(flux: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of two processes."""
    folder, cases = tmp_path_factory.mktemp("parallel"), {}
    chosen = [item.name for item in request.session.items if item.path == request.path]
    start = folder / "start"
    lora_files.write("diffusers", flux, start)

    def add(name: str, sharded: bool, resume: str | None = None, **changes: Any) -> None:
        kind, _, of = name.partition("-")
        if of in OF_RELEASE[kind] and not any(test.endswith(f"[{of}-{kind}]") for test in chosen):
            return
        cases[name] = sharded, recipe(flux, folder / name, **changes), resume

    for kind, sharded in (("ddp", False), ("fsdp", True)):
        for name, changes in SETTINGS.items():
            add(f"{kind}-{name}", sharded, **changes)
        for how, changes in STARTED.items():
            add(f"{kind}-{how}", sharded, start_from=str(start), start_as=how, **changes)
        add(f"{kind}-resumed", sharded, str(folder / f"{kind}-even" / "checkpoints" / "000001"), **SETTINGS["even"])
        signalled = {"call": 2, "number": signal.SIGTERM, "mark": str(folder / f"{kind}-signalled")}
        failing = {"call": 1, "number": 0, "mark": str(folder / f"{kind}-failed")}
        stops = SETTINGS["even"] | {"checkpoint_every": 5, "rewards": [reward("Interrupted", args=signalled)]}
        judged = EvaluationSettings(
            samples_per_prompt=2, grid_samples=2, rewards=[reward("Interrupted", args=failing, label="Brightness")]
        )
        add(f"{kind}-stopped", sharded, **stops)
        first = str(folder / f"{kind}-stopped" / "checkpoints" / "000001")
        add(f"{kind}-continued", sharded, first, **stops | {"evaluation": judged})
        add(f"{kind}-replica", sharded, rollout_replica=True, **BF16)
        add(f"{kind}-retain", sharded, **ONE_PASS["retain"])
        add(f"{kind}-win_rate", sharded, rewards=[reward("Brightness", win_rate=True)])
    add("ddp-reweight", False, **ONE_PASS["reweight"])
    add("fsdp-swap", True, lora=LoraSettings(rank=2, alpha=2), blocks_to_swap=1)
    add("fsdp-bf16", True, **BF16)
    memory = sum(checks.syncing(recipe(flux, folder / "counted", **BF16), WORLD)) / 2
    add("fsdp-auto", True, gradient_sync="auto", memory_gib=memory, vae_tiling="off", **BF16)
    # Nothing is left to do but to save the model.
    of_one_file = str(folder / "ddp-even" / "checkpoints" / "000001")
    add("fsdp-crossed", True, of_one_file, **SETTINGS["even"] | {"iterations": 1})
    return run_together(folder, cases)


@pytest.fixture(scope="module")
def alone(flux: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    recipes = {name: recipe(flux, folder / name, **changes) for name, changes in (SETTINGS | ONE_PASS).items()}
    lora_files.write("diffusers", flux, folder / "start")
    for how, changes in STARTED.items():
        if not any(f"[{how}-" in item.name for item in request.session.items):
            continue
        recipes[how] = recipe(flux, folder / how, start_from=str(folder / "start"), start_as=how, **changes)
    return run_alone(recipes)


def seen(runs: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(runs / f"{name}.{rank}.pt", weights_only=True) for rank in range(WORLD)]


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def newest(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint.load(checkpoint.complete(folder / "checkpoints")[-1])[0]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def assert_trained_as_one(runs: Path, alone: Alone, kind: str, name: str, processes: str = "") -> None:
    folder, before, after = alone[name]
    ranks = seen(runs, f"{kind}-{name}")
    assert ranks[0]["name"] == (processes or f"2 processes ({'FSDP2' if kind == 'fsdp' else 'DDP'})")
    assert_same_bits(ranks[0]["weights"], ranks[1]["weights"])
    changed = [
        torch.cat([(weights[key] - start).flatten() for key, start in before.items()])
        for weights in (ranks[0]["weights"], after)
    ]
    assert_same_training(*changed)

    ours, theirs = rows(folder), rows(runs / f"{kind}-{name}")
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert two["ratio_first_update_max_dev"] == 0.0
        assert one.keys() == two.keys() and one["pairs"] == two["pairs"] and one["dropped"] == two["dropped"]
        assert one["skipped"]["zero_advantage_skipped"] == two["skipped"]["zero_advantage_skipped"]
        for key in {"reward/Brightness", "reward/FirstGroup", "reward/Refusing", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=REORDERED_SUMS)


@pytest.mark.parametrize(("name", "kind"), each_kind(*SETTINGS, *STARTED))
def test_two_processes_train_as_one(runs: Path, alone: Alone, kind: str, name: str) -> None:
    assert_trained_as_one(runs, alone, kind, name)


@pytest.mark.parametrize("name", ONE_PASS)
def test_two_processes_train_as_one_in_one_pass(runs: Path, alone: Alone, name: str) -> None:
    """Gradients are reduced once, when they are weighted."""
    assert_trained_as_one(runs, alone, "ddp", name)
    updates = len(rows(runs / f"ddp-{name}"))
    assert [rank["reductions"] for rank in seen(runs, f"ddp-{name}")] == [updates] * WORLD


def test_shards_are_not_there_when_a_graph_is_gone_through(runs: Path) -> None:
    assert {rank["error"] for rank in seen(runs, "fsdp-retain")} == {
        'train.passes: got "retain" under FSDP2, which frees weights after a call, want 2'
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_reduced_once_per_update(runs: Path, kind: str) -> None:
    updates_of = {"even": 4, "uneven": 1, "lonely": 2, "lora": 2}
    for name, updates in updates_of.items():
        if name in OF_RELEASE[kind]:
            continue
        assert [rank["reductions"] for rank in seen(runs, f"{kind}-{name}")] == [updates] * WORLD
    # Two processes with the same number of calls of full micro-batches; each of them is reduced.
    (one, two), calls = seen(runs, f"{kind}-kl"), rows(runs / f"{kind}-kl")
    assert one["reductions"] == two["reductions"] == sum(row["skipped"]["model_rows"] for row in calls) // 2 // WORLD


def test_gradients_are_reduced_after_every_call_where_the_planner_finds_no_room(runs: Path) -> None:
    once, each = (seen(runs, f"fsdp-{name}") for name in ("bf16", "auto"))
    assert {rank["reductions"] for rank in once} == {1}
    calls = rows(runs / "fsdp-auto")[0]["skipped"]["model_rows"] // 2 // WORLD
    assert {rank["reductions"] for rank in each} == {calls} and calls > 1
    (state,) = (runs / "fsdp-auto" / "checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["gradient_sync"] == "call"


@pytest.mark.parametrize(("name", "kind"), each_kind("even", "uneven"))
def test_samples_are_divided(runs: Path, kind: str, name: str) -> None:
    one, two = (rank["kept"] for rank in seen(runs, f"{kind}-{name}"))
    batch = 8 if name == "even" else 9
    for (first, chosen), (second, also) in zip(one, two, strict=True):
        assert chosen == also == [*first, *second]
        assert set(first) <= set(share(batch, 0, WORLD)) and set(second) <= set(share(batch, 1, WORLD))


@pytest.mark.parametrize(("name", "kind"), each_kind("dropped"))
def test_what_is_dropped_is_dropped_everywhere(runs: Path, name: str, kind: str) -> None:
    one, two = (rank["kept"][0][1] for rank in seen(runs, f"{kind}-{name}"))
    assert one == two and rows(runs / f"{kind}-{name}")[0]["dropped"] == 15 - len(one)
    assert all(len(set(one) & set(share(15, index, WORLD))) < len(share(15, index, WORLD)) for index in range(WORLD))


@pytest.mark.parametrize(("count", "processes"), [(8, 2), (9, 2), (24, 5), (3, 3)])
def test_shares_are_whole_and_even(count: int, processes: int) -> None:
    parts = [share(count, index, processes) for index in range(processes)]
    assert [place for part in parts for place in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_are_those_of_one_process(runs: Path, alone: Alone, kind: str) -> None:
    # Before training there is nothing to round.
    assert_same_evaluations(runs, alone, kind, exact=2)


def assert_same_evaluations(runs: Path, alone: Alone, kind: str, *, exact: int) -> None:
    ours, theirs = rows(alone["even"][0], "evaluations"), rows(runs / f"{kind}-even", "evaluations")
    assert len(ours) == len(theirs) == 4
    assert ours[:exact] == theirs[:exact]
    for one, two in zip(ours[exact:], theirs[exact:], strict=True):
        assert one.pop("sampler") == two.pop("sampler")
        assert one == pytest.approx(two, rel=REORDERED_SUMS)
    for path in (alone["even"][0] / "samples").iterdir():
        assert (runs / f"{kind}-even" / "samples" / path.name).is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_end_with_the_same_bits(runs: Path, kind: str) -> None:
    whole, resumed = newest(runs / f"{kind}-even"), newest(runs / f"{kind}-resumed")
    assert whole.keys() == resumed.keys() == {"model", "optimizer", "ema", "rng"}
    for group, tensors in whole.items():
        assert_same_bits(resumed[group], tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_stops_all_and_a_judge_that_fails_in_one_none(runs: Path, kind: str) -> None:
    """The second process has the signal, and in the continued run the failure."""
    whole, stopped, continued = (runs / f"{kind}-{name}" for name in ("even", "stopped", "continued"))
    assert [rank["status"] for rank in seen(runs, stopped.name)] == [128 + signal.SIGTERM] * WORLD
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["000001"]
    assert [row["iteration"] for row in rows(stopped)] == [1] and not (stopped / "model").exists()
    assert all("status" not in rank for rank in seen(runs, continued.name))
    for group, tensors in newest(whole).items():
        assert_same_bits(newest(continued)[group], tensors)
    # Of the evaluation at the end, the ODE part is left out.
    assert rows(continued, "evaluations") == rows(whole, "evaluations")[3:]


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_resumes_with_a_warning(flux: Path, runs: Path, kind: str, tmp_path: Path) -> None:
    folder = runs / f"{kind}-even" / "checkpoints" / "000001"
    made = recipe(flux, tmp_path / "run", **SETTINGS["even"])
    made.prompts = json.loads((runs / "cases.json").read_text())[f"{kind}-even"]["recipe"]["prompts"]
    for one in (*made.rewards, *made.evaluation.rewards):
        one.name = "tests.train.tiny:" + one.name.rpartition(":")[2]
    with pytest.warns(UserWarning, match="processes 2 processes .*, this is one process"):
        trainer = Trainer(made, resume=str(folder))
    tensors = checkpoint.load(folder)[0]
    assert trainer.start == 1 and trainer.average is not None
    assert_same_bits({name: p.detach() for name, p in trainer.parameters.items()}, tensors["model"])
    assert_same_bits(trainer.average.values, tensors["ema"])


def test_each_process_writes_its_shards(runs: Path) -> None:
    """As torch.distributed.checkpoint reads them, without a process group."""
    import torch.distributed.checkpoint as dcp

    folder = runs / "fsdp-even" / "checkpoints" / "000002"
    for group in ("model", "optimizer", "ema"):
        wanted = checkpoint.load(folder)[0][group]
        files = sorted((folder / group).iterdir())
        assert [path.name for path in files] == ["00000-00000.safetensors", "00001-00000.safetensors"]
        sizes = [path.stat().st_size for path in files]
        assert max(sizes) < 0.6 * sum(sizes)
        found = {name: torch.full_like(value, torch.nan) for name, value in wanted.items()}
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder / group)), no_dist=True)
        assert_same_bits(found, wanted)
    assert (runs / "ddp-even" / "checkpoints" / "000002" / "optimizer.safetensors").is_file()


def test_shards_are_taken_from_whole_files(runs: Path) -> None:
    from diffusers import FluxTransformer2DModel

    wanted = checkpoint.load(runs / "ddp-even" / "checkpoints" / "000001")[0]
    for folder, group in (("model", "model"), ("model_ema", "ema")):
        loaded = FluxTransformer2DModel.from_pretrained(runs / "fsdp-crossed" / folder, subfolder="transformer")
        assert_same_bits(dict(loaded.named_parameters()), wanted[group])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_are_whole(runs: Path, kind: str) -> None:
    from diffusers import FluxTransformer2DModel

    run = runs / f"{kind}-even"
    for folder, group in (("model", "model"), ("model_ema", "ema")):
        loaded = FluxTransformer2DModel.from_pretrained(run / folder, subfolder="transformer")
        assert_same_bits(dict(loaded.named_parameters()), newest(run)[group])
    lora = runs / f"{kind}-lora" / "model" / "pytorch_lora_weights.safetensors"
    from safetensors.torch import load_file

    saved, trained = load_file(lora), newest(runs / f"{kind}-lora")["model"]
    assert sorted(value.sum().item() for value in saved.values()) == sorted(v.sum().item() for v in trained.values())


def test_a_resident_copy_changes_nothing(runs: Path) -> None:
    plain, resident = newest(runs / "fsdp-bf16"), newest(runs / "fsdp-replica")
    for group, tensors in plain.items():
        assert_same_bits(resident[group], tensors)
    for name in ("fsdp-bf16", "fsdp-replica"):
        assert [row["ratio_first_update_max_dev"] for row in rows(runs / name)] == [0.0]


def test_what_processes_cannot_do_is_refused(runs: Path) -> None:
    for rank in seen(runs, "ddp-replica"):
        assert rank["error"] == "train.rollout_replica: got true in 2 processes (DDP), want FSDP2, or false"
    for rank in seen(runs, "fsdp-swap"):
        assert rank["error"] == "model.blocks_to_swap: got 1 under FSDP2, want 0"
    for kind in KINDS:
        for rank in seen(runs, f"{kind}-win_rate"):
            assert rank["error"].startswith("train.prompts_per_iteration: got 3 on 2 processes, want a multiple")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: got 1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: got true"),
        ({"FSDP_VERSION": "2"}, "got FSDP without a process group"),
    ],
    ids=["version", "offload", "alone"],
)
def test_other_settings_of_fsdp_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in (settings | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Processes("no")
