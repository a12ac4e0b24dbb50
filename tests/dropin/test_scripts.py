"""Whole scripts, as they stand and under `run`: the ratios before their first update, and what is clipped of them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ..processes import together

HERE = Path(__file__).parent
# What the scripts clip at.
CLIP = 1e-4
OURS = {"stable_diffusion": "ddpo.ddim_step_with_logprob", "flux": "dancegrpo.flux_step"}
# Calls of the step in two rollouts, and in as many replays.
CALLS = {"stable_diffusion": 8, "flux": 6}

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
Updates = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Updates, Updates, dict[str, Any]]:
    """What the scripts saw of their updates, what they saw under `run`, and its report."""
    folder = tmp_path_factory.mktemp("scripts")
    script, report = str(HERE / "scripts" / "train.py"), folder / "report.json"
    options = ["--latents", "bfloat16", "--accelerate", "lossless:cpu", "--report", str(report)]
    commands = [
        [sys.executable, script, str(folder / "plain.json")],
        [sys.executable, "-m", "dancegrpo_fast.cli", "run", *options, script, str(folder / "run.json")],
    ]
    # Where they import the peers' functions from.
    path = os.pathsep.join([str(HERE.parent / "compat"), *filter(None, [os.environ.get("PYTHONPATH")])])
    together(commands, folder, [os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}] * 2)
    plain, run, said = (json.loads(file.read_text()) for file in (folder / "plain.json", folder / "run.json", report))
    return plain, run, said


def farthest(update: dict[str, Any]) -> float:
    return max(abs(ratio) for ratio in update["ratios"])


def clipped(update: dict[str, Any]) -> float:
    return sum(abs(ratio) > CLIP for ratio in update["ratios"]) / len(update["ratios"])


@pytest.mark.parametrize("script", OURS)
def test_the_first_update_is_on_policy(ran: tuple[Updates, Updates, dict[str, Any]], script: str) -> None:
    """Half of the samples and more are clipped before anything was learnt; none under `run`, whose ratios are 1."""
    before, after = ran[0][script], ran[1][script]
    assert farthest(before[0]) > CLIP and clipped(before[0]) > 0.5
    # There is one update for each rollout, so that all are first ones.
    assert [farthest(update) for update in after] == [0.0, 0.0]
    assert [clipped(update) for update in after] == [0.0, 0.0]
    # What is clipped has no gradient.
    assert after[0]["norm"] > before[0]["norm"]


def test_what_is_reported(ran: tuple[Updates, Updates, dict[str, Any]]) -> None:
    report = ran[2]
    functions = {found["by"][0]: found for found in report["functions"]}
    assert set(functions) == {f"dancegrpo_fast.compat.{ours}" for ours in OURS.values()} and not report["not_replaced"]
    for script, ours in OURS.items():
        found = functions[f"dancegrpo_fast.compat.{ours}"]
        assert [found[kind]["calls"] for kind in ("rollout", "replay")] == [CALLS[script]] * 2
    unet, transformer = report["accelerated"]
    assert (unet["class"], unet["accepted"]) == ("UNet2DConditionModel", False)
    wanted = {"class": "FluxTransformer2DModel", "mode": "lossless", "accepted": True, "reason": ""}
    assert transformer == wanted
