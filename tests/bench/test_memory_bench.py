"""The memory bench: its accounts of real calls, one family through its table, and its questions to the planner."""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from bench.gpu.memory import gauge
from bench.memory import choices, earlier, margins, report, table
from bench.memory.families import FAMILIES
from bench.memory.ledger import measure
from bench.memory.scenarios import SCENARIOS, Scenario
from bench.memory.table import Setting
from dancegrpo_fast.cli.memory import parse
from dancegrpo_fast.memory.planning import families, specs
from dancegrpo_fast.memory.planning.cards import CARDS

from ..tolerances import PREDICTED_BYTES

WHERE = {name: name for name in ("torch", "diffusers", "peft", "git", "date")}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 4, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x),)


def test_both_accounts_of_three_layers() -> None:
    weights, hidden, output = 4 * (8 * 32 + 32 * 4), 4 * 16 * 32, 4 * 16 * 4
    found = measure(Layers(), {"x": torch.zeros(16, 8)}, train=True)
    assert found.fixed == 2 * weights + 4 * 16 * 8
    assert found.saved == found.allocator_saved == 2 * hidden
    # GELU's input and output, its output's gradient, the last weight's, and the output with its gradient.
    assert found.peak == found.allocator_peak == found.fixed + 3 * hidden + 4 * 32 * 4 + 2 * output
    assert found.device_peak == found.peak and found.allocator_op.endswith("aten::mm")
    rollout = measure(Layers(), {"x": torch.zeros(16, 8)}, train=False)
    assert rollout.fixed == weights + 4 * 16 * 8 and rollout.peak == rollout.fixed + 2 * hidden


def test_memory_of_the_host_is_known() -> None:
    """Of a FLUX whose block inputs wait there."""
    family = next(f for f in FAMILIES if f.name == "FLUX")
    small = replace(family, height=64, width=64)
    setting = Setting("float32", "full", "off", table.OFFLOADED)
    with tempfile.TemporaryDirectory() as folder:
        spec = small.spec(Path(folder))
        found = table.measured(small, spec, setting, table.checkpoints(small, spec, setting))
    assert found.device_peak < found.peak


SETTINGS = (
    Setting("float32", "full", "off", "none"),
    Setting("bfloat16", "LoRA", "off", "full"),
    Setting("bfloat16", "LoRA", "fast, all", "none"),
    Setting("bfloat16", "full", "off", "rollout"),
    Setting("bfloat16", "LoRA", "off", "attention"),
    Setting("bfloat16", "full", "off", table.AUTO),
    Setting("float32", "full", "off", table.AUTO),
)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    family = replace(next(f for f in FAMILIES if f.name == "Qwen-Image"), height=128, width=128)
    with tempfile.TemporaryDirectory() as folder:
        spec = family.spec(Path(folder))
        yield [table.row(family, spec, setting, WHERE) for setting in SETTINGS]


@pytest.mark.release
def test_a_family_lies_within(rows: list[dict[str, Any]]) -> None:
    off = {(each["dtype"], each["policy"], key) for each, key, _ in report.beyond(rows) if key != "allocator_off"}
    # Of three blocks the last hands no text on and keeps less; the planner counts it as one in the middle.
    assert off <= {("bfloat16", table.AUTO, "planned_saved_off")}
    for found, setting in zip(rows, SETTINGS, strict=True):
        assert found["measured_peak"] > found["measured_fixed"] > 0
        assert found["measured_allocator_peak"] >= found["measured_peak"]
        assert (found["saved_off"] is not None) == setting.train
        assert ("planned_off" in found) == (setting.dtype != "float32")


@pytest.mark.release
def test_auto_is_a_mixture_that_stays_under_what_it_was_given(rows: list[dict[str, Any]]) -> None:
    chosen, plain = rows[-2:]
    assert len(set(re.findall(r"\d+ x ([\w +]+)", chosen["chosen"]))) > 1
    assert chosen["measured_device_peak"] <= chosen["limit"] * (1 + PREDICTED_BYTES)
    # The planner has no float32.
    assert plain["chosen"] == chosen["chosen"] and plain["limit"] is None
    assert sum("| Qwen-Image | bfloat16 | full |" in line for line in report.choices(rows)) == 1


@pytest.mark.release
def test_rows_as_text(rows: list[dict[str, Any]]) -> None:
    refused = rows[0] | {"planned_error": "ValueError: got this, want that"}
    assert "no plan for:\n\n- Qwen-Image | float32 | full | off | none: ValueError: got" in report.markdown([refused])
    text = report.markdown([*rows, rows[0] | {"patch": "lossless, gelu", "peak_off": -2 * report.WITHIN}])
    assert f"| Qwen-Image | {len(SETTINGS) + 1} |" in text
    assert "| traced: peak | -4.00 % | block ops see the recorder" in text
    assert len([line for line in text.splitlines() if line.startswith("| Qwen-Image | ")]) >= 1 + len(rows) + 1 + 1


def test_settings_have_every_policy_dtype_and_patch() -> None:
    every = list(table.settings(patched=True))
    assert len(set(every)) == len(every)
    assert {s.dtype for s in every} == set(table.DTYPES)
    for dtype in ("float32", "bfloat16"):
        for trained in ("full", "LoRA"):
            mine = {s.policy for s in every if (s.dtype, s.trained, s.patch) == (dtype, trained, "off")}
            assert mine - {"rollout"} == {*table.POLICIES, table.AUTO}
        assert "rollout" in {s.policy for s in every if s.dtype == dtype}
    plain = list(table.settings(patched=False))
    assert {s.patch for s in plain} == {"off"} and set(plain) < set(every)
    assert {f.denoiser for f in FAMILIES} <= set(families.FAMILIES)


def test_figures_of_the_earlier_count_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers are tested with the planner."""
    monkeypatch.setattr(earlier, "pieces", lambda given: given)
    answers = {"0.8": 0.84, "105": 105.5, "40": 30.0, "0": 0.0, "50": 60.0}
    figures = [
        earlier.Figure(text, "peak", {}, lambda _, answer=answer: answer, text, why="is told" if text == "50" else "")
        for text, answer in answers.items()
    ]
    monkeypatch.setattr(earlier, "FIGURES", figures)
    found = earlier.rows(WHERE)
    assert [row["why"] for row in found] == ["the earlier figure is rounded", None, "unknown", None, "is told"]
    assert [row["off"] is None for row in found] == [False, False, False, True, False]
    text = earlier.markdown(found)
    assert "5 figures, 3 further off than 2 %" in text
    assert "| 105 | peak | 105 | 105.50 | GiB | +0.5 % |  |" in text and "| 60.00 | GiB | +20.0 % | is told |" in text
    assert earlier.rows(WHERE, "105") == found[1:2]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[s.name for s in SCENARIOS])
def test_scenarios_are_valid_commands(scenario: Scenario) -> None:
    settings = parse(scenario.command.split()).settings
    assert settings.checkpointing == "auto" and specs.resolve(settings.model).hub is not None
    assert CARDS[settings.card].size in scenario.name
    assert sum(s.name == scenario.name for s in SCENARIOS) == 1


@pytest.mark.release
def test_a_question_that_has_no_answer_is_told() -> None:
    found = choices.row(Scenario("nothing", "flux-dev --height 721"), WHERE)
    assert found["exit_status"] == 2 and "height: got 721" in found["error"]
    assert found["peak_rss_bytes"] > 0 and choices.verdict(found) == "no plan"
    assert "No plan: " in choices.markdown([found])


def test_plans_as_text() -> None:
    phases = [{"name": "rollout", "budget": {"parameters": 3 << 30}, "bytes": 3 << 30, "seconds": 1.0, "op": "load"}]
    found = {
        "name": "FLUX",
        "command": "dancegrpo-fast memory flux-dev",
        "wall_seconds": 1.0,
        "cpu_seconds": 1.0,
        "peak_rss_bytes": 1 << 30,
        "settings": {"gpu_gib": 4.0},
        "policy": "full",
        "phases": [phases[0] | {"module": ""}],
        "peak": {"phase": "rollout", "bytes": 3 << 30, "total_bytes": 5 << 30},
        "margins": {"NCCL": 2 << 30},
        "reasons": ["as asked"],
        "advice": [{"text": "8-bit AdamW", "gib": -1.0, "seconds": 0.5}],
        "answer": "Does not fit 4 GiB: 1.0 GiB are missing.",
        "cards": [{"gib": 4.0, "state": "no", "spare_bytes": -(1 << 30)}],
        "environment": WHERE,
    }
    text = choices.markdown([found])
    assert "| FLUX | 3.0 | 5.0 | 4 | 1.0 GiB are missing | rollout | full |" in text
    assert "| rollout | 3.0 | 3.0 | 5.0 | 1.0 |" in text and "-1.00 GiB, +50.0 %: 8-bit AdamW" in text
    assert "**Does not fit 4 GiB: 1.0 GiB are missing.** Peak: rollout" in text


class FakeCuda:
    """An allocator of CPU tensors' bytes: it is told of 100 at first, 700 after the forward, and at most 1,000."""

    def __init__(self) -> None:
        self.told = [100, 700] * 2
        self.calls: list[str] = []

    def memory_allocated(self) -> int:
        return self.told.pop(0)

    def max_memory_allocated(self) -> int:
        return 1000

    def max_memory_reserved(self) -> int:
        return 2000

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


def test_a_gpu_is_asked_after_a_first_call() -> None:
    cuda = FakeCuda()
    weight = torch.ones(3, requires_grad=True)
    found = gauge.on_cuda(lambda: 2 * weight, cuda)
    # The output and its gradient are not kept for the backward.
    assert found == gauge.Taken(900, 600 - 2 * 12, 1000, 2000)
    assert cuda.told == [] and cuda.calls.count("reset_peak_memory_stats") == 2
    assert weight.grad is not None
    # A call without gradients keeps nothing.
    cuda.told = [100] * 2
    assert gauge.on_cuda(lambda: 2 * weight, cuda, train=False) == gauge.Taken(900, 0, 1000, 2000)


def test_margins_are_what_others_saw() -> None:
    """Rows with an address each, the planner's figures beside their spread, and no card with more than torch has."""
    rows = margins.read("allocators")
    assert all(row["source"].startswith("https://") for row in rows)
    text = margins.markdown(rows)
    assert "| 13.08 % | 13 % |" in text and "| 27.06 % | 36.47 % | 27 % |" in text
    for row in margins.read("cards"):
        seen = [row["torch_gib"], *(row.get("torch_gib_seen") or ())]
        assert row["card"] not in CARDS or CARDS[row["card"]].gib <= min(seen)
