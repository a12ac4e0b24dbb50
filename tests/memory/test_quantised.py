"""Frozen weights in fewer bits: bytes of real quantised models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.lora import add_lora
from dancegrpo_fast.memory.planning.quantised import Quantised, kept_casts, nf4_parts, quantised
from dancegrpo_fast.memory.trace.tracer import measure
from dancegrpo_fast.quantization import store_in_fp8

from ..release import release_but
from ..tolerances import PREDICTED_BYTES
from .small import TARGETS, case_of, tiny

pytest.importorskip("diffusers")
pytest.importorskip("peft")
RANK = 4


def stored(family: str, folder: Path) -> Quantised:
    prepared(family)[0].save_config(folder / "transformer")
    return quantised(case_of(folder, lora=RANK, kernel="cpu"), "fp8")


def prepared(family: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny(family, torch.bfloat16)
    add_lora(model, RANK, RANK, TARGETS)
    # So that the first block is like the others.
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name].requires_grad_()
    return model, inputs


@pytest.mark.release
@pytest.mark.parametrize("family", release_but(("flux",), ["flux", "hunyuan"]))
def test_layerwise_casting_is_what_a_real_run_takes(family: str, tmp_path: Path) -> None:
    found = stored(family, tmp_path)
    live: dict[tuple[str, bool], int] = {}
    for policy in ("none", "full"):
        for casting in (False, True):
            model, inputs = prepared(family)
            if casting:
                store_in_fp8(model, torch.bfloat16)
                assert found.stored == sum(p.numel() * p.element_size() for p in model.parameters())
            if policy == "full":
                model.enable_gradient_checkpointing()
            whole = sum(p.numel() * p.element_size() for p in model.parameters())
            live[policy, casting] = sum(measure(model, inputs).live("forward").values())
            if not casting:
                live[policy, casting] -= whole
    for policy in ("none", "full"):
        kept, again = kept_casts(found, (policy,))
        predicted = found.stored + live[policy, False] + kept
        assert live[policy, True] == pytest.approx(predicted, rel=PREDICTED_BYTES)
        assert (kept > 0) == (policy == "none") and (again > 0) == (policy == "full")


def test_policies_of_single_blocks_keep_their_casts(tmp_path: Path) -> None:
    found = stored("flux", tmp_path)
    count = len(found.casts)
    each = ["full"] * (count - 1) + ["none"]
    assert kept_casts(found, each) == (found.casts[-1], max(found.casts[:-1]))


def _held(tensors: list[Tensor | None]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (48, 80), (7, 34)])
def test_formulas_are_what_bitsandbytes_stores(rows: int, columns: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    four = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    assert _held([four.data, four.quant_state.absmax, four.quant_state.code]) == sum(nf4_parts(rows * columns))
    eight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    assert _held([eight.CB, eight.SCB]) == rows * columns + 4 * rows
