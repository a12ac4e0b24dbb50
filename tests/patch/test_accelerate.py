"""What keeps working on an accelerated transformer, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers import transformer_flux
from torch import nn
from torch.nn import functional as F

import dancegrpo_fast as dgf
from dancegrpo_fast.patch import SUPPORTED, _pieces

from ..ops.block_cases import Recorder, held
from ..release import release_but
from ..tolerances import assert_within_budget
from .models import FAMILIES, TINY, assert_gradients_within_budget, assert_same_bits, doubled, run

BF16, F32 = torch.bfloat16, torch.float32
LORA = {
    "flux": ["to_q", "to_v", "add_k_proj", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out", "norm1.linear"],
    "hunyuan": ["to_q", "to_v", "add_k_proj", "net.0.proj", "net.2", "proj_mlp", "proj_out"],
    "sd3.5": ["to_q", "to_out.0", "add_v_proj", "net.2"],
    "qwen": ["to_q", "to_out.0", "add_v_proj", "net.2", "img_mod.1"],
    "wan": ["to_q", "to_k", "to_out.0", "net.2"],
}


def _lora(model: Any, name: str) -> None:
    from peft import LoraConfig

    torch.manual_seed(2)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=LORA[name], init_lora_weights=False))


@pytest.mark.parametrize("first", [True, False], ids=["LoRA first", "LoRA after"])
@pytest.mark.parametrize("name", release_but(("flux", "wan"), FAMILIES))
def test_lora_before_and_after(name: str, first: bool) -> None:
    """Frozen weights under trained adapters: other tensors need gradients, and other tensors are kept."""
    model, inputs = TINY[name].model(BF16), TINY[name].inputs(BF16)
    plain = copy.deepcopy(model)
    _lora(plain, name)
    wanted = run(plain, inputs)
    if first:
        _lora(model, name)
    dgf.accelerate(model, "lossless", recompute="all")
    if not first:
        _lora(model, name)
    assert_same_bits(run(model, inputs), wanted)
    assert wanted[1] and all("lora" in key for key in wanted[1])


def test_model_inside_a_peft_model() -> None:
    from peft import LoraConfig, get_peft_model

    model, inputs = TINY["flux"].model(F32), TINY["flux"].inputs(F32)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    wanted = run(wrapped, inputs)
    undo = dgf.accelerate(wrapped)
    assert "forward" in vars(model.transformer_blocks[0])
    assert_same_bits(run(wrapped, inputs), wanted)
    undo()


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_keys_and_copies(name: str, tmp_path: Path) -> None:
    model, inputs = TINY[name].model(F32), TINY[name].inputs(F32)
    keys = list(model.state_dict())
    dgf.accelerate(model, "fast")
    wanted = run(model, inputs)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert twin.config == model.config
    assert_same_bits(run(twin, inputs), wanted)
    with torch.no_grad():
        next(iter(twin.parameters())).add_(1.0)
    assert not torch.equal(run(twin, inputs)[0], wanted[0])
    assert_same_bits(run(model, inputs), wanted)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    dgf.accelerate(loaded, "fast")
    assert torch.equal(run(loaded.eval(), inputs)[0], wanted[0])


def _assert_lossless(actual: Any, wanted: Any, truth: Any) -> None:
    """Output to the bit; gradients within the budget, as torch's products depend on the layout of their operands."""
    assert torch.equal(actual[0], wanted[0])
    assert_gradients_within_budget(actual[1], truth[1], wanted[1])


@pytest.mark.parametrize("name", ["flux", "hunyuan", "qwen", "wan"])
def test_attention_backend_of_the_model_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = TINY[name].model(F32), TINY[name].inputs(F32)
    flash: list[bool] = []
    original = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        # What diffusers' "_native_math" asks torch for.
        flash.append(torch.backends.cuda.flash_sdp_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model.set_attention_backend("_native_math")
    wanted = run(model, inputs)
    dgf.accelerate(model, "lossless")
    truth = run(TINY[name].model(F32).double(), doubled(inputs))
    flash.clear()
    _assert_lossless(run(model, inputs), wanted, truth)
    # HunyuanVideo's refiner has no backend.
    assert flash and flash.count(False) >= len(flash) - 1
    model.reset_attention_backend()
    flash.clear()
    with attention_backend("native"):
        run(model, inputs)
    assert all(flash)


# Layers of a family's blocks whose results go to an op of ours, which takes their biases.
READ = {
    "flux": ("to_q", "to_k", "add_q_proj", "add_k_proj", "to_out.0", "to_add_out", "net.2", "proj_out"),
    "wan": ("attn1.to_out.0", "net.2"),
}
READ |= dict.fromkeys(("hunyuan", "sd3.5", "qwen"), READ["flux"])


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_are_summed_where_the_gradient_is_written(name: str) -> None:
    """Once each, in "fast" alone; what the ops then give is compared in `test_lossless.py`."""

    def counted(**options: Any) -> tuple[int, int]:
        model, inputs = TINY[name].model(), TINY[name].inputs()
        undo = dgf.accelerate(model, **options)
        blocks = [m for m in model.modules() if "forward" in vars(m) and m is not model]
        with Recorder("dgf") as recorder:
            model(**inputs, return_dict=False)[0].sum().backward()
        undo()
        summed = 0
        for called, arguments, _ in recorder.calls:
            backward = called.name().removeprefix("dgf::")
            if backward in BIASES:
                summed += sum(flag for i, flag in enumerate(arguments[-2]) if i in BIASES[backward])
        # Nothing reads the text behind Qwen-Image's last block.
        given = [key for block in blocks for key, p in block.named_parameters() if p.grad is not None]
        return summed, sum(key.endswith(tuple(f"{layer}.bias" for layer in READ[name])) for key in given)

    summed, wanted = counted(mode="fast")
    assert summed == wanted > 0
    assert counted(mode="lossless")[0] == 0


# Where a backward's flags of what is wanted are those of biases.
BIASES = {
    "norm_modulate_backward": (7,),
    "gated_residual_backward": (2,),
    "qk_norm_rope_backward": (4, 5, 10, 11),
}


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_fused_projections(name: str) -> None:
    model, inputs = TINY[name].model(BF16), TINY[name].inputs(BF16)
    model.fuse_qkv_projections()
    wanted = run(model, inputs)
    double = TINY[name].model(BF16).double()
    double.fuse_qkv_projections()
    dgf.accelerate(model, "lossless", recompute="all")
    _assert_lossless(run(model, inputs), wanted, run(double, doubled(inputs)))


@pytest.mark.parametrize("name", release_but(("flux",), FAMILIES))
def test_compiled_blocks(name: str) -> None:
    """Whole blocks without a graph break; the ops stay opaque, so the budget is that of eager torch."""
    torch._dynamo.reset()
    # One block of each kind; SD3's last one has no text behind its attention.
    layers = {"num_layers": 2 if name == "sd3.5" else 1}
    layers |= {"num_single_layers": 1} if name in ("flux", "hunyuan") else {}
    tiny = replace(TINY[name], changes=TINY[name].changes | layers)
    model, inputs = tiny.model(F32), tiny.inputs(F32)
    plain, _ = run(model, inputs)
    truth, _ = run(tiny.model(F32).double(), doubled(inputs))
    dgf.accelerate(model, "fast")
    wanted = run(model, inputs)
    for block in [m for m in model.modules() if "forward" in vars(m) and m is not model]:
        block.compile(fullgraph=True, backend="aot_eager")
    output, grads = run(model, inputs)
    assert_within_budget(output, truth, plain)
    # A compiled backward gives zeros where nothing leads to a parameter.
    for key, grad in wanted[1].items():
        assert grads[key].isfinite().all() if grad is not None else grads[key] is None or not grads[key].any()
    torch._dynamo.reset()


def _saved_bytes(model: nn.Module, inputs: dict[str, Any]) -> int:
    return held(lambda: model(**inputs, return_dict=False), but=model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_less_is_kept_for_the_backward(name: str) -> None:
    model, inputs = TINY[name].model(BF16), TINY[name].inputs(BF16)
    kept = [_saved_bytes(model, inputs)]
    for recompute in ("none", "gelu", "all"):
        undo = dgf.accelerate(model, "fast", recompute=recompute)
        kept.append(_saved_bytes(model, inputs))
        undo()
    dgf.accelerate(model, "fast", recompute="all", gates_from_weights=True)
    kept.append(_saved_bytes(model, inputs))
    assert sorted(kept, reverse=True) == kept and len(set(kept)) == len(kept)


class TestRefusals:
    """Nothing is half patched."""

    def refused(self, model: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            dgf.accelerate(model, **options)
        assert not any("forward" in vars(m) and m is not model for m in model.modules())

    def test_unknown_architecture_lists_the_known(self) -> None:
        self.refused(nn.Linear(2, 2), "Linear, want one of diffusers' " + ", ".join(SUPPORTED))

    def test_block_of_another_diffusers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

        monkeypatch.setattr(transformer_flux.FluxSingleTransformerBlock, "forward", forward)
        self.refused(TINY["flux"].model(), "FluxSingleTransformerBlock.forward differs from the code that this patch")

    def test_missing_source(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(transformer_flux, "_get_fused_projections")
        self.refused(TINY["flux"].model(), "_get_fused_projections is missing")

    def test_second_patch(self) -> None:
        model = TINY["wan"].model()
        undo = dgf.accelerate(model)
        with pytest.raises(ValueError, match="wrapped already"):
            dgf.accelerate(model)
        undo()
        dgf.accelerate(model)()

    def test_other_processor(self) -> None:
        class Other:
            def __call__(self, *unused: Any) -> None: ...

        model = TINY["hunyuan"].model()
        model.single_transformer_blocks[1].attn.processor = Other()
        self.refused(model, r"single_transformer_blocks.1.attn.processor: got Other, want HunyuanVideoAttnProcessor2_0")

    def test_processor_changed_afterwards(self) -> None:
        model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
        dgf.accelerate(model)
        model.transformer_blocks[0].attn.processor = object()
        with pytest.raises(ValueError, match=r"attn\.processor: got object, want FluxAttnProcessor"):
            model(**inputs)

    @pytest.mark.parametrize("name", ["FluxSingleTransformerBlock.forward", "FluxAttnProcessor.__call__"])
    def test_a_class_that_is_changed_afterwards_is_followed(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        owner, _, attribute = name.partition(".")
        home = getattr(transformer_flux, owner)
        original = getattr(home, attribute)

        def doubled(*arguments: Any, **more: Any) -> Any:
            found = original(*arguments, **more)
            return tuple(2 * part for part in found) if isinstance(found, tuple) else 2 * found

        model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
        plain = run(copy.deepcopy(model), inputs)
        dgf.accelerate(model)
        with monkeypatch.context() as patch:
            patch.setattr(home, attribute, doubled)
            with pytest.warns(UserWarning, match=rf"{name} was changed after accelerate\(\): Flux"):
                changed = run(model, inputs)
            plainly_changed = run(TINY["flux"].model(), inputs)
        assert_same_bits(changed, plainly_changed)
        assert not torch.equal(changed[0], plain[0])
        assert_same_bits(run(model, inputs), plain)

    def test_other_layers(self) -> None:
        model = TINY["flux"].model()
        model.transformer_blocks[1].norm2 = nn.LayerNorm(64)
        self.refused(model, r"transformer_blocks.1.norm2: got LayerNorm.*want a LayerNorm without weights")
        model = TINY["wan"].model()
        model.blocks[0].ffn.net[0].approximate = "none"
        self.refused(model, r"blocks.0.ffn: got FeedForward")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"mode": "exact"}, 'mode: got "exact", want "lossless" or "fast"'),
            ({"recompute": "most"}, 'recompute: got "most", want one of none, gelu, all'),
            ({"backend": "cuda"}, 'backend: got "cuda"'),
            ({"gates_from_weights": True}, 'gates_from_weights: got True with mode "lossless"'),
            ({"trim_text": True}, "trim_text: got True for FluxTransformer2DModel"),
        ],
    )
    def test_settings(self, options: dict[str, Any], match: str) -> None:
        self.refused(TINY["flux"].model(), match, **options)

    def test_arguments_of_the_replaced_processor(self) -> None:
        model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
        dgf.accelerate(model)
        with pytest.raises(ValueError, match=r"joint_attention_kwargs: got \['ip_hidden_states'\]"):
            model(**inputs, joint_attention_kwargs={"ip_hidden_states": []})

    def test_undo_under_a_later_wrapper(self) -> None:
        model = TINY["flux"].model()
        undo = dgf.accelerate(model)
        block = model.transformer_blocks[0]
        ours = block.forward
        block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        with pytest.raises(RuntimeError, match="wrapped after accelerate"):
            undo()
        assert vars(model.transformer_blocks[1])["forward"]
        block.forward = ours
        undo()
        assert not any("forward" in vars(m) for m in model.modules())


def test_joined_views() -> None:
    whole = torch.randn(2, 5, 4, requires_grad=True) * 1.0
    first, second = whole[:, :2], whole[:, 2:]
    assert _pieces.joined(first, second) is whole
    assert _pieces.joined(second, first) is not whole
    assert _pieces.joined(first, second[:, 1:]) is not whole
    assert torch.equal(_pieces.joined(first, second + 0), whole)
    # A part that was cut off from the graph keeps its own gradient.
    leaf = first.detach().requires_grad_()
    joined = _pieces.joined(leaf, second)
    joined.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


@pytest.mark.parametrize("hook", ["tensor", "retained", "module"])
def test_joined_views_that_are_watched(hook: str) -> None:
    """What waits for the gradient of a part gets it, as FSDP does to gather weights."""
    seen: list[torch.Tensor] = []

    class Cut(nn.Module):
        def forward(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return whole[:, :2], whole[:, 2:]

    cut = Cut()
    if hook == "module":
        cut.register_full_backward_hook(lambda module, grads, outs: seen.extend(outs))
    whole = torch.randn(2, 5, 4, requires_grad=True) * 1.0
    first, second = cut(whole)
    if hook == "tensor":
        second.register_hook(seen.append)
    if hook == "retained":
        second.retain_grad()
    joined = _pieces.joined(first, second)
    assert torch.equal(joined, whole)
    joined.sum().backward()
    seen += [second.grad] if hook == "retained" else []
    assert seen and torch.equal(seen[-1], torch.ones_like(second))
