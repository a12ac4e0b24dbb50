"""What layers of bitsandbytes allocate and keep, beside those that stand for them in a trace."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dancegrpo_fast.lora import add_lora
from dancegrpo_fast.memory.planning.cases import build, least_of, resolved
from dancegrpo_fast.memory.planning.converted import Converted, convert, layers
from dancegrpo_fast.memory.planning.planner import Iteration
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.memory.trace.tracer import measure, trace

from ..release import release_but
from .small import TARGETS, case_of, tiny

pytest.importorskip("diffusers")
pytest.importorskip("peft")
RANK = 4
KINDS = ("int8", "nf4")
CASES = [f"{kind} {policy}" for kind in KINDS for policy in ("none", "full")]


def adapted(model: nn.Module) -> nn.Module:
    add_lora(model, RANK, RANK, TARGETS)
    return model


def loaded(model: nn.Module, kind: str) -> nn.Module:
    """As diffusers loads it: each linear layer is bitsandbytes', and LoRA layers are peft's for these."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        weight = layer.weight.detach()
        if kind == "nf4":
            made: Any = bnb.nn.Linear4bit(*sizes, has_bias, torch.bfloat16, quant_type="nf4", compress_statistics=False)
            made.weight = bnb.nn.Params4bit(weight, False, quant_type="nf4", compress_statistics=False).to("cpu")
        else:
            made = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, threshold=0.0)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        made.bias = layer.bias
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, made)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # type: ignore[assignment]  # flags
    return adapted(model)


@pytest.mark.parametrize("case", release_but(("int8 full",), CASES))
def test_what_a_real_forward_keeps_is_traced(case: str) -> None:
    kind, policy = case.split()
    kept = {}
    for real in (True, False):
        model, inputs = tiny("flux", torch.bfloat16)
        # So that the first block is like the others.
        for name in ("hidden_states", "encoder_hidden_states"):
            inputs[name].requires_grad_()
        if real:
            model = loaded(model, kind)
        else:
            convert(adapted(model), kind, ())
        if policy == "full":
            model.enable_gradient_checkpointing()
        found = measure(model, inputs) if real else trace(model, inputs, attention="cpu")
        alive = found.alive(found.phases["forward"][1])
        # bitsandbytes' scales are no tensors of a module, and so first seen in the forward.
        kept[real] = sum(s.size for s in alive if s.phase == "forward" and s.op != "existing")
    assert kept[False] == kept[True]


def test_int8_keeps_inputs_that_a_checkpoint_would_drop() -> None:
    kept = {}
    for kind in ("none", *KINDS):
        model, inputs = tiny("flux", torch.bfloat16)
        adapted(model)
        if kind != "none":
            convert(model, kind, ())
        model.enable_gradient_checkpointing()
        kept[kind] = trace(model, inputs).kept_bytes
    assert kept["int8"] > kept["nf4"] == kept["none"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_its_conversions(kind: str) -> None:
    tokens, width, wide = 96, 64, 320
    layer = Converted(nn.Linear(width, wide, device="meta", dtype=torch.bfloat16), kind, False)
    x = torch.empty(tokens, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    found = trace(layer, {"x": x})
    made = found.peak_of("forward").bytes - sum(found.live("load").values())
    out = tokens * wide
    # The weight in 16 bits and the result; codes of the input, sums, and these in two types of 16 bits.
    assert made == {"nf4": 2 * width * wide + 2 * out, "int8": tokens * width + (4 + 2 + 2) * out}[kind]
    assert found.flops_by_group["forward"]["matmul"] == 2 * out * width
    assert found.flops_by_group["backward"]["matmul"] == 2 * out * width


def test_only_frozen_linear_layers_are_converted() -> None:
    case = case_of("flux-dev", 64, lora=RANK)
    model = build(case, least_of(resolved("flux-dev")))
    expected = set(layers(model, ("norm_out",)))
    bias = copy.copy(model.get_submodule("x_embedder").bias)
    convert(model, "nf4", ("norm_out",))
    assert {name for name, module in model.named_modules() if isinstance(module, Converted)} == expected
    assert not [name for name in expected if "norm_out" in name or "lora" in name]
    assert model.get_submodule("x_embedder").bias.dtype == bias.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.release
def test_a_plan_has_what_int8_keeps(tmp_path: Path) -> None:
    tiny("flux", torch.bfloat16)[0].save_config(tmp_path / "transformer")
    given = {"lora": RANK, "checkpointing": "full", "height": 256, "width": 256, "attention": "flash"}
    saved = {}
    for kind in ("none", "int8"):
        plan = Iteration(Settings(str(tmp_path), quantization=kind, **given))
        forward, _ = plan.training(plan.pick().blocks)
        saved[kind] = forward.budget.get("saved", 0)
    assert saved["int8"] > 2 * saved["none"]
