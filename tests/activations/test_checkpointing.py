"""Checkpoint policies change no bit of results and gradients, and keep what they say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dancegrpo_fast.activations import checkpointing, operators
from dancegrpo_fast.activations.checkpointing import KEEPABLE, FirstBlocks, Keep, PerBlock, apply, blocks_of

from ..patch.models import assert_same_bits, run
from ..release import release_but
from .policies import MODELS, POLICIES, add_lora, build, mixed

# Each value of each setting with most of the others'.
CASES = [
    (torch.float32, False, "unpatched"),
    (torch.bfloat16, True, "unpatched"),
    (torch.float32, True, "lossless all"),
    (torch.bfloat16, False, "fast gelu"),
]


@pytest.mark.parametrize(("dtype", "lora", "patch"), CASES)
@pytest.mark.parametrize("name", release_but(("flux", "unet"), MODELS))
def test_same_bits(name: str, dtype: torch.dtype, lora: bool, patch: str) -> None:
    if name == "unet" and patch != "unpatched":
        pytest.skip("UNets have no patch")
    model = build(name, dtype, lora, patch)
    inputs = MODELS[name].inputs(dtype)
    wanted = run(model, inputs)
    for policy, offload in [*((policy, False) for policy in POLICIES), ("full", True), ("mixed", True)]:
        undo = apply(model, POLICIES[policy] or mixed(model), offload=offload)
        assert_same_bits(run(model, inputs), wanted)
        undo()


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_those_that_the_model_runs(name: str) -> None:
    model: Any = build(name)
    called = []

    def record(block: nn.Module, *args: Any) -> Any:
        called.append(block)
        return block(*args)

    model.enable_gradient_checkpointing(record)
    run(model, MODELS[name].inputs())
    assert [id(block) for block in blocks_of(model)] == [id(block) for block in called]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", ["full", "attention", "matmul", Keep(KEEPABLE)], ids=str)
def test_dropout_is_drawn_again(policy: Any, offload: bool) -> None:
    model = build("flux")
    add_lora(model, torch.float32, dropout=0.5)
    model.train()
    inputs = MODELS["flux"].inputs()

    def seeded(seed: int) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
        torch.manual_seed(seed)
        found = run(model, inputs)
        return *found, torch.rand(3)

    plain = seeded(5)
    assert not torch.equal(plain[0], seeded(6)[0])
    undo = apply(model, policy, offload=offload)
    again = seeded(5)
    assert_same_bits(again[:2], plain[:2])
    assert torch.equal(again[2], plain[2])
    undo()


@pytest.mark.parametrize("name", release_but(("flux", "unet"), MODELS))
def test_autocast(name: str) -> None:
    model = build(name)
    inputs = MODELS[name].inputs()

    def mixed_precision() -> tuple[Tensor, dict[str, Tensor | None]]:
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, inputs)

    wanted = mixed_precision()
    for policy, offload in [*((policy, False) for policy in POLICIES), ("attention", True)]:
        undo = apply(model, POLICIES[policy] or mixed(model), offload=offload)
        assert_same_bits(mixed_precision(), wanted)
        undo()


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_outside_an_autocast_of_two_forwards(policy: str) -> None:
    model = build("flux")
    inputs = MODELS["flux"].inputs()

    def outputs() -> list[Tensor]:
        return [model(**inputs, return_dict=False)[0] for _ in range(2)]

    apply(model, POLICIES[policy] or mixed(model))
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
        first, second = outputs()
    found = [torch.autograd.grad(out.sum(), blocks_of(model)[0].parameters()) for out in (second, first)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_that_draws_is_not_kept() -> None:
    groups = frozenset({"attention", "elementwise"})
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert checkpointing.keeps(groups, flash, (None, None, None), {})
    assert not checkpointing.keeps(groups, flash, (None, None, None, 0.1), {})
    assert not checkpointing.keeps(groups, flash, (None, None, None), {"dropout_p": 0.1})
    assert not checkpointing.keeps(groups, torch.ops.aten.native_dropout.default, (), {})
    assert checkpointing.keeps(groups, torch.ops.aten.add.Tensor, (), {})
    assert not checkpointing.keeps(groups, torch.ops.aten.add_.Tensor, (), {})


@pytest.mark.parametrize("policy", ["full", "attention"])
def test_two_graphs_at_once_and_backward_in_any_order(policy: str) -> None:
    model = build("flux", patch="fast gelu")
    first, second = MODELS["flux"].inputs(), MODELS["flux"].inputs(batch=1)
    wanted = {k: a + b for (k, a), b in zip(run(model, first)[1].items(), run(model, second)[1].values(), strict=True)}
    apply(model, policy, offload=True)
    losses = [model(**inputs, return_dict=False)[0].double().square().mean() for inputs in (first, second)]
    with torch.no_grad():
        model(**first, return_dict=False)
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


def test_undo_restores_what_was_there() -> None:
    model: Any = build("flux")
    calls = []

    def own(block: nn.Module, *args: Any) -> Any:
        calls.append(block)
        return checkpoint(block, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(own)
    inner = apply(model, "none")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    outer = apply(model, "attention", offload=True)
    with pytest.raises(RuntimeError, match="undo: the model's checkpointing was changed after"):
        inner()
    outer()
    inner()
    run(model, MODELS["flux"].inputs())
    assert len(calls) == len(blocks_of(model))


def test_wrapped_models() -> None:
    peft = pytest.importorskip("peft")
    model = build("sd3.5")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert apply(wrapped, "full").model is model
    assert apply(torch.compile(wrapped), "full").model is model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: apply(m, "everything"), 'policy: got "everything", want one of none, full, attention, matmul, Keep'),
        (lambda m: apply(m, 3), "policy: got 3, want one of"),
        (
            lambda m: apply(m, FirstBlocks(5)),
            r"policy: got FirstBlocks\(5\), want an int from 0 to the model's 4 blocks",
        ),
        (lambda m: apply(m, FirstBlocks(True)), r"policy: got FirstBlocks\(True\), want an int"),
        (lambda m: apply(m, PerBlock(("full",))), "policy: got PerBlock for 1 blocks, want the model's 4"),
        (lambda m: apply(m, Keep({"attn"})), "groups: got attn, want some of attention, matmul"),
        (lambda m: apply(m, "none", offload=True), "offload: got True with a policy that checkpoints nothing"),
        (lambda m: apply(m, "full", offload="host"), 'offload: got "host", want True or False'),
        (lambda m: apply(nn.Linear(2, 2), "full"), "model: got torch.nn.modules.linear.Linear, want a diffusers model"),
    ],
)
def test_bad_input_changes_nothing(call: Callable[[nn.Module], Any], message: str) -> None:
    model: Any = build("flux")
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


OPERATORS = {
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu aten::_scaled_dot_product_efficient_attention "
        "aten._scaled_dot_product_cudnn_attention.default aten::_scaled_dot_product_cudnn_attention_backward "
        "flash_attn::_flash_attn_forward flash_attn::_flash_attn_varlen_forward flash_attn_3::fwd "
        "_diffusers_flash_attn_3::_flash_attn_forward _flash_attn2_9e27194::mha_varlen_fwd "
        "xformers::efficient_attention_forward_cutlass xformers_flash::flash_fwd flex_attention"
    ),
    "matmul": (
        "aten::mm aten.addmm.default aten::bmm aten::linear aten::_scaled_mm aten::convolution "
        "aten::convolution_backward bitsandbytes::gemv_4bit"
    ),
    "norm": (
        "aten::native_layer_norm aten::native_group_norm_backward aten::_fused_rms_norm dgf::norm_modulate "
        "dgf::gated_residual_norm_modulate"
    ),
    "rope": "dgf::qk_norm_rope",
    "activation": "dgf::gelu_tanh aten::gelu_backward aten::_softmax",
    "elementwise": "dgf::gated_residual aten.add.Tensor add_ aten::addcmul",
    "cast": "aten::_to_copy",
    "other": "aten::expand aten::view aten::upsample_bilinear2d aten::linalg_vector_norm dgf::policy_loss",
    "copy": "aten::cat",
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in OPERATORS for name in OPERATORS[group].split()])
def test_groups(group: str, name: str) -> None:
    assert operators.group(name) == group


def _compiled_blocks(model: Any) -> None:
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager")


@pytest.mark.parametrize("offload", release_but((True,), [False, True]))
def test_compiled_blocks(offload: bool) -> None:
    model = build("wan")
    inputs = MODELS["wan"].inputs()
    _compiled_blocks(model)
    wanted = run(model, inputs)
    for policy in ("full", FirstBlocks(1)):
        undo = apply(model, policy, offload=offload)
        assert_same_bits(run(model, inputs), wanted)
        undo()
    with pytest.raises(ValueError, match="policy: got one that keeps results of single ops, with blocks compiled"):
        apply(model, "attention", offload=offload)


def test_blocks_compiled_after_a_selective_policy() -> None:
    model = build("wan")
    apply(model, "matmul")
    _compiled_blocks(model)
    with pytest.raises(ValueError, match="policy: got one that keeps results of single ops, with blocks compiled"):
        model(**MODELS["wan"].inputs())


@pytest.mark.parametrize("policy", release_but(("mixed",), ["full", "attention", "mixed"]))
def test_model_compiled_as_a_whole(policy: str) -> None:
    model = build("wan")
    inputs = MODELS["wan"].inputs()
    wanted = run(model, inputs)
    apply(model, mixed(model) if policy == "mixed" else policy)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(compiled, inputs)
    assert torch.equal(found[0], wanted[0])
    for name, grad in wanted[1].items():
        # Compiled graphs may add the gradients of a tensor's uses in another order.
        torch.testing.assert_close(found[1][f"_orig_mod.{name}"], grad)
