"""peft's LoRA layers in accelerated blocks: bits, kept bytes, which layers the op computes, and what falls back."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dancegrpo_fast as dgf
from dancegrpo_fast.patch import _layers

from ..ops.block_cases import Recorder, held
from ..release import release_but
from ..tolerances import assert_within_budget
from .models import FAMILIES, TINY, Inputs, assert_gradients_within_budget, assert_same_bits, doubled, run

peft = pytest.importorskip("peft")

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# Every linear layer of a block but those of its modulation.
NAMES = r"to_q|to_k|to_v|to_out\.0|add_\w_proj|to_add_out|proj|net\.2|proj_mlp|proj_out"
TARGETS = rf"(single_)?(transformer_)?blocks\.\d.*\.({NAMES})"
OPS = ("lora_linear", "lora_update", "lora_linear_backward", "lora_update_backward")


def adapted(name: str, base: torch.dtype = BF16, lora: torch.dtype = F32, batch: int = 2, **options: Any) -> Any:
    """A tiny model whose frozen weights are under LoRA layers, and inputs."""
    model: Any = TINY[name].model(base)
    torch.manual_seed(2)
    given = {"r": 3, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False} | options
    model.add_adapter(peft.LoraConfig(**given))
    for key, parameter in model.named_parameters():
        if "lora" in key:
            parameter.data = parameter.data.to(lora)
    return model, TINY[name].inputs(base, batch)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def sampled(model: nn.Module, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor | None]]:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0], {}


def called(model: nn.Module, inputs: Inputs, call: Callable[..., Any] = run) -> Counter[str]:
    with Recorder("dgf") as recorder:
        call(model, inputs)
    return Counter(name for name in recorder.names if name in OPS)


@pytest.mark.parametrize("name", release_but(FAMILIES, TINY))
def test_lossless_changes_no_bit(name: str) -> None:
    for base, lora, batch, options in (
        (BF16, F32, 2, {}),
        (BF16, F32, 1, {"lora_alpha": 3}),
        (BF16, BF16, 2, {}),
        (F32, F32, 2, {"r": 64}),
    ):
        model, inputs = adapted(name, base, lora, batch, **options)
        wanted = run(model, inputs)
        undo = dgf.accelerate(model, "lossless", recompute="all")
        assert_same_bits(run(model, inputs), wanted)
        undo()
        assert_same_bits(run(model, inputs), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_one_op(name: str) -> None:
    model, inputs = adapted(name)
    count = len(layers_of(model))
    undo = dgf.accelerate(model, "fast")
    found = called(model, inputs)
    # What the last block makes of the text of some models is of no use.
    assert found["lora_linear"] == count and 0 < found["lora_linear_backward"] <= count
    undo()
    assert not called(model, inputs)
    dgf.accelerate(model, "lossless")
    assert called(model, inputs)["lora_update"] >= count - 2


@pytest.mark.parametrize("name", release_but(("flux", "wan"), FAMILIES))
def test_fast_is_within_the_budget(name: str) -> None:
    model, inputs = adapted(name)
    plain, plain_grads = run(model, inputs)
    truth, truth_grads = run(copy.deepcopy(model).double(), doubled(inputs))
    dgf.accelerate(model, "fast", recompute="all")
    output, grads = run(model, inputs)
    assert_within_budget(output, truth, plain)
    assert_gradients_within_budget(grads, truth_grads, plain_grads)


@pytest.mark.parametrize("name", release_but(("flux", "wan"), FAMILIES))
def test_rollout_and_replay_have_the_same_bits(name: str) -> None:
    model, inputs = adapted(name)
    for mode in ("lossless", "fast"):
        undo = dgf.accelerate(model, mode, recompute="all")
        wanted = run(model, inputs)
        with torch.no_grad():
            assert torch.equal(model(**inputs, return_dict=False)[0], wanted[0])
        model.enable_gradient_checkpointing()
        assert_same_bits(run(model, inputs), wanted)
        model.disable_gradient_checkpointing()
        undo()


@pytest.mark.parametrize("name", release_but(("flux", "wan"), FAMILIES))
def test_layers_keep_their_input_once(name: str) -> None:
    """Without block ops every layer keeps a float32 copy; with them, bfloat16, once, and what can be computed again."""
    model, inputs = adapted(name)
    weights = list(model.parameters())

    def kept() -> int:
        return held(lambda: model(**inputs, return_dict=False), weights)

    eager = kept()
    sizes = []
    for mode, recompute in (("lossless", "gelu"), ("fast", "gelu"), ("lossless", "all"), ("fast", "all")):
        undo = dgf.accelerate(model, mode, recompute=recompute)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_layers, "_is_known", lambda forward: False)
            before = kept()
        sizes.append(kept())
        assert sizes[-1] < 0.8 * before and before < eager
        undo()
    assert sizes[3] < sizes[1] <= sizes[0] and sizes[2] < sizes[0]


def two_active(model: Any) -> None:
    torch.manual_seed(4)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "second")
    model.set_adapters(["default", "second"])


def hook(*arguments: Any) -> None:
    return None


def each(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def changed(model: Any) -> None:
        for layer in layers_of(model).values():
            change(layer)

    return changed


def cast_off(layer: Any) -> None:
    layer.cast_input_dtype_enabled = False
    for part in (layer.lora_A, layer.lora_B):
        part.to(BF16)


def wrapped(layer: Any) -> None:
    layer.base_layer.forward = layer.base_layer.forward


def other_class(layer: Any) -> None:
    layer.base_layer.__class__ = type("Quantised", (nn.Linear,), {})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda model: model.disable_adapters(),
    "merged": each(lambda layer: layer.merge()),
    "two active": two_active,
    "a hook on the layer": each(lambda layer: layer.register_forward_hook(hook)),
    "a hook on its base": each(lambda layer: layer.base_layer.register_forward_pre_hook(hook)),
    "a hook on A": each(lambda layer: layer.lora_A["default"].register_full_backward_hook(hook)),
    "a hook on B": each(lambda layer: layer.lora_B["default"].register_forward_hook(hook)),
    "a wrapped base": each(wrapped),
    "another class of base": each(other_class),
    "no cast of the input": each(cast_off),
}


@pytest.mark.parametrize("mode", release_but(("lossless",), ["lossless", "fast"]))
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_op_does_not_compute_runs_as_peft_has_it(change: str, mode: str) -> None:
    """Also where it comes while the model is accelerated."""
    model, inputs = adapted("flux")
    plain = copy.deepcopy(model)
    undo = dgf.accelerate(model, mode)
    assert called(model, inputs)
    for one in (model, plain):
        CHANGES[change](one)
    # Switched off or merged, LoRA layers have no gradients.
    call = sampled if change in ("disabled", "merged") else run
    found = call(model, inputs)
    assert not called(model, inputs, call)
    if mode == "lossless":
        assert_same_bits(found, call(plain, inputs))
    undo()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_other_kinds_of_layers(options: dict[str, Any]) -> None:
    model, inputs = adapted("flux", F32, F32, **options)
    plain = copy.deepcopy(model)
    dgf.accelerate(model)
    found = []
    for one in (model, plain):
        torch.manual_seed(3)
        found.append(run(one, inputs))
    assert_same_bits(*found)
    assert not called(model, inputs)
    if "lora_dropout" in options:
        assert called(model.eval(), inputs)["lora_update"]


def test_a_replica_of_data_parallel_is_looked_at_as_its_original_is() -> None:
    """Its weights are attributes, no parameters."""
    layer = nn.Linear(4, 3)
    replica: Any = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight * 1, layer.bias * 1
    for one in (layer, replica):
        assert _layers.is_plain_linear(one, F32) and not _layers.is_plain_linear(one, BF16)


def test_autocast_and_global_hooks() -> None:
    model, inputs = adapted("flux", F32, F32)
    wanted = run(model, inputs)
    dgf.accelerate(model)
    with torch.autocast("cpu", dtype=BF16):
        assert not called(model, inputs)
    with nn.modules.module.register_module_forward_hook(hook):
        assert_same_bits(run(model, inputs), wanted)
        assert not called(model, inputs)


def test_a_changed_peft_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("flux")
    dgf.accelerate(model)
    calls_of_base = 0

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls_of_base
        calls_of_base += 1
        return self.base_layer(x)

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", forward)
    with pytest.warns(UserWarning, match=r"lora\.layer\.Linear\.forward is not the code of peft 0\.18 to 0\.21"):
        assert not called(model, inputs, sampled)
    assert calls_of_base == len(layers_of(model))


def test_scales_and_adapters_may_change() -> None:
    model, inputs = adapted("flux")
    plain = copy.deepcopy(model)
    dgf.accelerate(model)
    for one in (model, plain):
        one.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "second")
    first, second = layers_of(model), layers_of(plain)
    with torch.no_grad():
        for name, layer in first.items():
            for part, other in ((layer.lora_A, second[name].lora_A), (layer.lora_B, second[name].lora_B)):
                for key in part:
                    other[key].weight.copy_(part[key].weight)
    seen = []
    for adapter, scale in (("second", 1.0), ("default", 1.0), ("default", 0.25)):
        for one in (model, plain):
            one.set_adapters([adapter], weights=[scale])
        wanted = run(plain, inputs)
        assert_same_bits(run(model, inputs), wanted)
        seen.append((wanted[0], called(model, inputs)["lora_update"]))
    assert seen[0][1] < seen[1][1] == seen[2][1]
    assert not torch.equal(seen[1][0], seen[2][0])
