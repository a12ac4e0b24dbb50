"""Tokens split between two gloo processes: one process's output and gradients, whatever the family, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dancegrpo_fast.sequence import check

from .patch.models import TINY
from .processes import together
from .release import release_but
from .sequence_worker import CASES, RING, WORLD
from .tolerances import REORDERED_DOUBLE_SUMS, REORDERED_SUMS

ULYSSES = [f"ulysses {name}" for name in CASES]
BOTH = [*ULYSSES, *(f"ring {name}" for name in RING)]
# Of each family one.
FEW = {case for case in BOTH if case.partition(" ")[2] in ("flux", "hunyuan", "qwen", "wan")}
GLOO = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found in the cases that the chosen tests look at."""
    chosen = [case for case in BOTH if any(f"[{case}]" in item.name for item in request.session.items)]
    folder = tmp_path_factory.mktemp("sequence")
    worker, files = str(Path(__file__).with_name("sequence_worker.py")), [str(folder / "store"), str(folder / "found")]
    together([[worker, str(rank), *files, *chosen] for rank in range(WORLD)], folder, scripts=True)
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(WORLD)]


@GLOO
@pytest.mark.parametrize("case", release_but(FEW, BOTH))
def test_two_processes_have_the_gradients_of_one(found: list[dict[str, Any]], case: str) -> None:
    """The sum over the processes."""
    # Wan's norms compute in float32.
    limit = REORDERED_SUMS if case.startswith(("ring", "ulysses wan")) else REORDERED_DOUBLE_SUMS
    for rank in found:
        wanted, split = rank[case]
        assert wanted.keys() == split.keys() and len(wanted) > 10
        # A bias of keys moves no softmax: its gradient is rounding alone.
        largest = max(float(value.norm()) for key, value in wanted.items() if key != "output")
        for key, value in wanted.items():
            size = float(value.norm()) if key == "output" else largest
            assert float((split[key] - value).norm()) <= limit * size, key


@GLOO
@pytest.mark.parametrize("name", release_but(FEW, BOTH))
def test_blocks_and_checkpoints_change_no_bit(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        wanted, others = rank[f"{name}, the same bits"]
        assert len(others) == 3
        for what, values in others.items():
            assert values.keys() == wanted.keys()
            assert not [key for key in wanted if not torch.equal(values[key], wanted[key])], what
    assert torch.equal(found[0][f"{name}, the same bits"][0]["output"], found[1][f"{name}, the same bits"][0]["output"])


@GLOO
@pytest.mark.parametrize("name", release_but(FEW, ULYSSES))
def test_bytes_are_those_that_are_traced_without_the_others(found: list[dict[str, Any]], name: str) -> None:
    """The books of a process of two, beside those of a trace of it alone, of which the plan is made."""
    for rank in found:
        predicted, measured = rank[f"{name}, bytes"]
        assert predicted == measured


@pytest.mark.parametrize(
    ("name", "size", "kind", "tokens", "text", "said"),
    [
        ("sd3", 2, "ulysses", 16, 8, "2 for a SD3Transformer2DModel, whose attention calls torch's SDPA past"),
        ("hunyuan token replace", 2, "ulysses", 16, 8, "2 for a first frame whose tokens are modulated apart, want 1"),
        ("hunyuan", 2, "ring", 16, 8, '"ring" for a HunyuanVideoTransformer3DModel'),
        ("qwen", 2, "ulysses", 16, 8, "2 for a QwenImageTransformer2DModel of 3 heads, want a divisor of 3"),
        ("flux", 2, "ulysses", 2025, 8, "2 for a sampler of 1 x 720 x 720, which is 2025 tokens; want a divisor"),
        ("flux", 4, "ulysses", 16, 6, "4 for 6 tokens of text, want a divisor of 6, or model.max_text_tokens"),
    ],
)
def test_what_cannot_be_split_is_refused(name: str, size: int, kind: str, tokens: int, text: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"^train.sequence_(parallel|kind): (got )?{said}"):
        check(TINY[name].model(), size, kind, {"a sampler of 1 x 720 x 720": tokens}, text)


def test_text_that_no_block_splits_may_be_of_any_length() -> None:
    check(TINY["wan"].model(), 2, "ring", {"a sampler": 16}, 7)


def test_unets_are_refused() -> None:
    from .models import parts

    with pytest.raises(ValueError, match=r"^train\.sequence_parallel: got 2 for a UNet2DConditionModel, whose convol"):
        check(parts.unet(8), 2, "ulysses", {}, 8)
