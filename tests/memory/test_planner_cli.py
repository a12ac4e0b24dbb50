"""`dancegrpo-fast memory`: what it prints, writes and exits with."""

import json
from pathlib import Path

import pytest

from dancegrpo_fast.cli import main
from dancegrpo_fast.cli.memory import parse
from dancegrpo_fast.memory.planning import advice, planner
from dancegrpo_fast.memory.planning.budget import CATEGORIES
from dancegrpo_fast.memory.planning.cards import CARDS

from ..train import tiny

pytest.importorskip("diffusers")
pytest.importorskip("jsonargparse")

pytestmark = pytest.mark.usefixtures("collected_once")

FLUX = ["memory", "flux-dev", "--height", "256", "--width", "256", "--lora", "16"]


def test_a_plan_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main([*FLUX, "--gpu", "80", "--json", str(file), "--rewards", "hps,clip_score"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "replay backward",
        "peak:",
        "margins (guesses)",
        "32 GB yes and every larger one",
        "checkpointing none",
        "one change at a time",
    ):
        assert part in shown
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["settings"]["lora"] == 16 and found["settings"]["gpu_gib"] == CARDS["h100"].gib
    assert {card["size"]: card["state"] for card in found["cards"]}["80 GB"] == "yes"
    assert [reward["name"] for reward in found["settings"]["rewards"]] == ["hps", "clip_score"]
    for phase in found["phases"]:
        assert phase["bytes"] == sum(phase["budget"].values()) and set(phase["budget"]) <= set(CATEGORIES)
    assert found["peak"]["bytes"] == max(phase["bytes"] for phase in found["phases"])


def test_one_that_does_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # One of the changes that are traced anew; the planner's tests have all.
    nf4 = advice.Knob("frozen weights in nf4", {"quantization": "nf4"})
    monkeypatch.setattr(advice, "_traced_anew", lambda _: [nf4])
    assert main([*FLUX, "--gpu", "20", "--checkpointing", "full"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("Does not fit 20 GiB: ") and "20 GiB no" in shown
    assert "nf4" in shown and "fits then" in shown
    # The advice has been looked at.
    monkeypatch.setattr(planner, "advice", lambda *_, **__: ())
    assert main([*FLUX, "--gpu", "5"]) == 1
    tiny = capsys.readouterr().out
    assert tiny.startswith("Does not fit 5 GiB: ") and "- weights, gradients and states take 22." in tiny


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--frames", "2"], "frames: got 2"),
        (["--card", "h1000"], 'memory: card: got "h1000", want one of h100, '),
        (["--card", "h100", "--gpu", "80"], "memory: gpu: got 80 beside card h100, want one of them"),
        (["--json", "no/such/folder/plan.json"], "memory: json: got no/such/folder/plan.json, want a file in a folder"),
        (["--gpu", "nan"], "memory: gpu: got nan, want"),
        (["--attention", "foo"], 'memory: attention: got "foo", want'),
        (["--target_modules", "to_q, foo"], "target_modules: got foo, want"),
        (["--rewards", "beauty"], "rewards: got beauty"),
        (["--offload", "everything"], 'offload: got "everything"'),
        (["--num_steps", "many"], "memory: num_steps: got many, want int"),
        (["--no_such_setting", "1"], "no_such_setting"),
    ],
)
def test_bad_input(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLUX, *given]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


def test_what_is_not_in_a_plan_is_said(tmp_path: Path) -> None:
    made = tiny.recipe_of(
        family="flux",
        path="base",
        compile="blocks",
        kind="dance_sde",
        num_steps=4,
        eta=0.3,
        height=64,
        width=64,
        iterations=1,
        prompts_per_iteration=1,
        group_size=2,
        micro_batch=1,
        mixed_precision="bf16",
        prompts="prompts.txt",
    )
    rewards, compiled = parse([str(tiny.write_recipe(made, tmp_path / "recipe.yaml"))]).uncounted
    assert rewards.startswith("models of the rewards ") and compiled.startswith('model.compile "blocks": bytes')
