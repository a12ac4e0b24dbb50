"""What FSDP2 really has on a rank, and what the planner says of it: tiny real models in a group of fake ranks."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench.memory.families import RANK
from bench.memory.fsdp import PHASES, Setting, markdown, rows

from ..release import release_but
from ..tolerances import PREDICTED_BYTES

pytestmark = pytest.mark.usefixtures("collected_once")

WHERE = {name: name for name in ("torch", "diffusers", "git", "date")}
MASTERS = "fp32_master"
CASES = (
    ("FLUX", Setting(policy="none", strategy="shard_grad_op")),
    ("FLUX", Setting(lora=RANK)),
    ("HunyuanVideo", Setting(dtype=MASTERS, gradient_sync="update", replica=True)),
)


@pytest.mark.parametrize("case", release_but(CASES[:1], CASES), ids=str)
def test_what_fully_shard_has_is_planned(case: tuple[str, Setting]) -> None:
    name, setting = case
    [row] = rows(name, WHERE, [setting])
    assert markdown([row]).count(f"| {name} |") == 1
    for phase in PHASES:
        planned, measured = row[f"planned_{phase}"], row[f"measured_{phase}"]
        assert planned == pytest.approx(measured, rel=PREDICTED_BYTES), (row, phase)


@pytest.mark.release
def test_a_unets_plan_is_an_upper_bound() -> None:
    [row] = rows("SD UNet", WHERE, [Setting(dtype=MASTERS)])
    for phase in PHASES:
        assert row[f"planned_{phase}"] >= row[f"measured_{phase}"], phase
