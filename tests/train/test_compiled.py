"""`model.compile`: rollout and replay run one graph, whatever a graph without gradients rounds otherwise."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dancegrpo_fast.recipe import EvaluationSettings, RewardSettings
from dancegrpo_fast.train.loop import Trainer

from ..models.checks import assert_same_weights, weights
from ..release import release_but
from .test_parallel import GLOO
from .tiny import make_recipe, reward, write_recipe

SETTINGS = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit", "optimize_ddp")
# Of twelve samples' calls the last has rows to fill.
SMALL: dict[str, Any] = {"micro_batch": 5, "iterations": 2}


@pytest.fixture(autouse=True)
def own_compiler() -> Iterator[None]:
    import torch._dynamo as dynamo

    dynamo.reset()
    with dynamo.config.patch({name: getattr(dynamo.config, name) for name in SETTINGS}):
        yield
    dynamo.reset()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[bool]]:
    """Instead of Inductor: for each of its graphs whether it has gradients; those without are `off` by a part."""

    def use(off: float) -> list[bool]:
        graphs: list[bool] = []

        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            graphs.append(torch.is_grad_enabled())
            factor = 1.0 if graphs[-1] else 1.0 + off

            def run(*args: Any) -> Any:
                return [value * factor if value.is_floating_point() else value for value in graph(*args)]

            return run

        def compiled(self: nn.Module, **_: Any) -> None:
            self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, dynamic=False)

        monkeypatch.setattr(nn.Module, "compile", compiled)
        return graphs

    return use


def deviations(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["ratio_first_update_max_dev"] for row in rows]


@pytest.mark.parametrize("base", release_but(["flux"], ["flux", "diffusion"]), indirect=True)
@pytest.mark.parametrize("what", release_but(["blocks"], ["blocks", "whole"]))
@pytest.mark.parametrize("off", release_but([1e-4], [0.0, 1e-4]))
def test_rollout_and_replay_run_the_same_forward(
    base: Path, tmp_path: Path, compiler: Callable[[float], list[bool]], what: str, off: float
) -> None:
    """And nothing is compiled after the start: neither layouts nor filled rows nor evaluation are other graphs."""
    graphs = compiler(off)
    # More steps make a model of its own of evaluation's.
    evaluation = EvaluationSettings(rewards=[reward("Brightness")], samples_per_prompt=2, num_steps=5)
    waits = {"checkpointing": "full", "offload": ["block_inputs"]} if what == "blocks" else {}
    trainer = Trainer(make_recipe(base, tmp_path / "run", compile=what, evaluation=evaluation, **waits, **SMALL))
    assert trainer.model.compiled is not None and trainer.model.compiled.with_gradients == (off > 0)
    at_start = list(graphs)
    assert at_start.count(True) == at_start.count(False) > 0
    trainer.run()
    assert graphs == at_start
    assert deviations(tmp_path / "run") == [0.0, 0.0]


def test_a_forward_with_other_bits_would_show(
    flux: Path, tmp_path: Path, compiler: Callable[[float], list[bool]]
) -> None:
    compiler(1e-4)
    trainer = Trainer(make_recipe(flux, tmp_path / "run", compile="blocks", **SMALL))
    assert trainer.model.compiled is not None
    trainer.model.compiled.with_gradients = False
    with pytest.warns(UserWarning, match="the first update's ratio is .* away from 1"):
        assert trainer.iteration(1)["ratio_first_update_max_dev"] > 0


def test_weights_keep_their_names_and_a_switch_is_told(
    flux: Path, tmp_path: Path, compiler: Callable[[float], list[bool]]
) -> None:
    """What a compiled run wrote goes on as it is; without compiling, or with, once that is asked for."""
    compiler(0.0)
    for name, what in (("plain", None), ("compiled", "blocks")):
        Trainer(make_recipe(flux, tmp_path / name, compile=what, **SMALL)).run()
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    saved = [sorted(path.name for path in (tmp_path / name / "model").rglob("*")) for name in ("compiled", "plain")]
    assert saved[0] == saved[1]
    Trainer(make_recipe(flux, tmp_path / "parts", compile="blocks", **SMALL | {"iterations": 1})).run()
    Trainer(make_recipe(flux, tmp_path / "parts", compile="blocks", **SMALL), "auto").run()
    assert_same_weights(tmp_path / "compiled", tmp_path / "parts")
    longer = make_recipe(flux, tmp_path / "parts", **SMALL | {"iterations": 3})
    with pytest.raises(ValueError, match=r'model.compile: got null, want "blocks"'):
        Trainer(longer, "auto")
    whole = make_recipe(flux, tmp_path / "parts", compile="whole", checkpointing="full", **SMALL | {"iterations": 3})
    with pytest.raises(ValueError, match=r'got "full", want "none"'):
        Trainer(whole, "auto", "model.compile")
    trainer = Trainer(longer, "auto", "model.compile")
    assert trainer.model.compiled is None
    assert trainer.iteration(3)["ratio_first_update_max_dev"] == 0.0


@pytest.mark.release
def test_kl_is_zero_where_the_copy_is_compiled_alike(
    flux: Path, tmp_path: Path, compiler: Callable[[float], list[bool]]
) -> None:
    compiler(1e-4)
    row = Trainer(make_recipe(flux, tmp_path / "run", compile="whole", kl_weight=0.1, **SMALL)).iteration(1)
    assert row["reference_kl"] == 0.0


@pytest.mark.release
@GLOO
def test_two_processes_under_ddp(flux: Path, tmp_path: Path) -> None:
    """Whose buckets would cut the replay's graphs, and not the rollout's."""
    bright = RewardSettings(name="tests.train.tiny:Brightness")
    recipe = make_recipe(flux, tmp_path / "run", compile="whole", prompts_per_iteration=2, rewards=[bright])
    file = write_recipe(recipe, tmp_path / "recipe.yaml")
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dancegrpo_fast.cli", "train", str(file)]
    # From the root, where the reward is.
    root = Path(__file__).parents[2]
    environ = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launched], cwd=root, env=environ, check=True)
    assert deviations(tmp_path / "run") == [0.0, 0.0]


def test_graphs_without_end_are_an_error(
    flux: Path, tmp_path: Path, compiler: Callable[[float], list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch would compute the rest without compiling, with other bits."""
    import torch._dynamo as dynamo

    compiler(0.0)
    monkeypatch.setattr("dancegrpo_fast.compiling.GRAPHS", 1)
    with (
        dynamo.config.patch(recompile_limit=1),
        pytest.raises(ValueError, match=r'model.compile: got "whole", which torch does not compile .*limit'),
    ):
        Trainer(make_recipe(flux, tmp_path / "run", compile="whole", **SMALL))


def test_a_cpu_needs_a_compiler(flux: Path, tmp_path: Path) -> None:
    from torch._inductor import config

    recipe = make_recipe(flux, tmp_path / "run", compile="blocks")
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match=r'model.compile: got "blocks" without a C\+\+ compiler that works'),
    ):
        Trainer(recipe)
