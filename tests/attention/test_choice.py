"""The choice of an attention backend: what is picked, what is refused, and applying it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dancegrpo_fast.attention import choice as attention
from dancegrpo_fast.attention.choice import Shapes
from dancegrpo_fast.attention.facts import FACTS
from dancegrpo_fast.patch import accelerate

from ..models import parts
from ..patch.conftest import own_attention_backend  # noqa: F401  # autouse here too
from ..patch.models import FAMILIES, TINY, assert_same_bits, diffusers, doubled, hunyuan_inputs, run
from ..tolerances import assert_as_printed, assert_same_formula

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
BACKENDS = [backend.value for backend in dispatch.AttentionBackendName]
SAGE = [name for name in BACKENDS if "sage" in name]
GPUS = ("cuda:sm80", "cuda:sm89", "cuda:sm90", "cuda:sm100", "cuda:sm120")
# 53 frames of 480x640.
VIDEO = Shapes(batch=1, tokens=17056)
CLASSES = {
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "qwen": "QwenImageTransformer2DModel",
    "wan": "WanTransformer3DModel",
}


def real(family: str, **changes: Any) -> nn.Module:
    """A model of real width with one block of a kind."""
    layers = {"num_layers": 1} | ({"num_single_layers": 1} if family in ("hunyuan", "flux") else {})
    with torch.device("meta"):
        return getattr(diffusers, CLASSES[family])(**layers | changes)


def trimmed(family: str) -> nn.Module:
    model = real(family)
    accelerate(model, "fast", trim_text=True)
    return model


def libraries(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    for name in ("FLASH_ATTN", "FLASH_ATTN_3", "SAGE_ATTN", "XFORMERS_ATTN", "NPU_ATTN", "XLA_ATTN"):
        monkeypatch.setattr(dispatch, f"_CAN_USE_{name}", there)
    monkeypatch.setattr(dispatch, "is_kernels_available", lambda: there)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every library were there."""
    libraries(monkeypatch, True)
    monkeypatch.setattr(dispatch, "is_kernels_version", lambda *_: True)


def reason(choice: attention.Choice, backend: str) -> str:
    (found,) = [text for text in choice.reasons if text.startswith(f"{backend}: ")]
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize(
    ("family", "shapes", "unmasked"),
    [
        ("flux", VIDEO, True),
        ("wan", VIDEO, True),
        ("hunyuan", VIDEO, False),
        ("qwen", Shapes(2, 4608), False),
        ("qwen", Shapes(2, 4608, equal_text=True), True),
    ],
)
def test_choice_without_libraries(family: str, shapes: Shapes, unmasked: bool, device: str, training: bool) -> None:
    choice = attention.choose(real(family), shapes, device, training)
    new = device in ("cuda:sm90", "cuda:sm100")
    assert choice.backend == "native"
    assert choice.kernel == ("cuDNN" if new else "FA2" if unmasked else "efficient")
    assert (choice.mask == "kept") is not unmasked
    assert set(choice.order) <= {"native", "_native_cudnn", "_native_flash", "_native_efficient"}
    assert choice.order[0] == "native"
    assert ("_native_flash" in choice.order) is unmasked
    assert "never holds the scores" in reason(choice, "native")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.usefixtures("installed")
def test_choice_with_every_library(device: str, training: bool) -> None:
    new = device in ("cuda:sm90", "cuda:sm100")
    choice = attention.choose(real("flux"), VIDEO, device, training)
    assert choice.backend == ("native" if new else "flash")
    assert ("xformers" in choice.order) is (device in GPUS[:3])
    assert "downloads" in reason(choice, "flash_hub")
    assert ("_flash_3" in choice.order) is (device == "cuda:sm90" and not training)
    assert ("sage" in choice.order) is not training
    allowed = attention.choose(real("flux"), VIDEO, device, training, hub_kernels=True)
    assert allowed.backend == ("_flash_3_hub" if device == "cuda:sm90" else choice.backend)
    masked = attention.choose(real("hunyuan"), VIDEO, device, training, hub_kernels=True)
    assert masked.backend == "native"


@pytest.mark.parametrize("family", ["hunyuan", "qwen"])
@pytest.mark.usefixtures("installed")
def test_ragged_text_has_no_mask(family: str) -> None:
    shapes, plain = Shapes(2, 17056), real(family)
    kept = attention.choose(plain, shapes, "cuda:sm80", True)
    assert kept.kernel == "efficient" and "accelerate(trim_text=True) goes without" in kept.mask_condition
    for device, backend, kernel, how in (
        ("cuda:sm80", "flash", "FA2", "in one call"),
        ("cuda:sm90", "native", "cuDNN", "in a call each"),
        ("cpu", "native", "CPU flash", "in a call each"),
    ):
        choice = attention.choose(trimmed(family), shapes, device, True)
        assert (choice.mask, choice.backend, choice.kernel) == ("dropped", backend, kernel)
        assert f"prompts of unequal length {how}" in choice.reasons[0]
        assert ("brings the mask back" in choice.reasons[0]) is (backend == "flash")
    # diffusers' own way through them reads lengths in every layer.
    for backend in ("flash_varlen", "_flash_varlen_3", "flash_varlen_hub"):
        assert attention.check(trimmed(family), backend, shapes, "cuda:sm90", True).mask == "dropped"
        with pytest.raises(ValueError, match=r"takes no mask|in every layer|wrong results"):
            attention.check(plain, backend, shapes, "cuda:sm90", True)
    undo = accelerate(plain, "fast", trim_text=False)
    assert attention.choose(plain, shapes, "cuda:sm80", True).mask == "kept"
    undo()


def test_ragged_text_keeps_its_mask_under_context_parallelism() -> None:
    choice = attention.choose(trimmed("hunyuan"), VIDEO, "cuda:sm80", True, parallel="ulysses")
    assert choice.mask == "kept" and "context parallelism splits padded text" in choice.mask_condition


@pytest.mark.parametrize("device", ["cpu", *GPUS])
@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.usefixtures("installed")
def test_reasons_name_every_backend_once(family: str, device: str) -> None:
    choice = attention.choose(real(family), Shapes(2, 512), device, True)
    assert sorted(text.split(": ")[0] for text in choice.reasons) == sorted(BACKENDS)
    assert choice.reasons[0].startswith(f"{choice.backend}: ")
    assert all(len(text.split(": ", 1)[1]) > 3 for text in choice.reasons)


@pytest.mark.parametrize("device", ["cpu", "cuda:sm90"])
@pytest.mark.usefixtures("installed")
def test_models_outside_the_dispatcher_keep_native(device: str) -> None:
    for model in (real("sd3"), parts.unet(16)):
        choice = attention.choose(model, Shapes(2, 64), device, True)
        assert choice.order == ("native",)
        with pytest.raises(ValueError, match="whatever backend is set"):
            attention.check(model, "flash", Shapes(2, 64), device, True)


def test_unknown_backends_of_a_newer_diffusers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FACTS, "flex")
    choice = attention.choose(real("flux"), VIDEO, "cuda:sm90", True)
    assert "not judged" in reason(choice, "flex")


@pytest.mark.parametrize(
    ("family", "backend", "shapes", "device", "training", "message"),
    [
        ("flux", "_flash_3", VIDEO, "cuda:sm90", True, "without an autograd formula"),
        *(("flux", name, VIDEO, "cuda:sm120", True, "8-bit.*without a backward") for name in SAGE),
        ("hunyuan", "xformers", VIDEO, "cuda:sm90", True, "13 GiB a layer.*wrong results"),
        ("hunyuan", "flash", VIDEO, "cuda:sm90", True, "takes no mask.*always builds one"),
        ("hunyuan", "_native_flash", VIDEO, "cuda:sm90", False, "takes no mask"),
        ("hunyuan", "_native_math", VIDEO, "cuda:sm90", True, "26 GiB of scores a layer, over max_scores_gib=1"),
        ("flux", "flex", VIDEO, "cuda:sm90", True, "26 GiB of scores"),
        ("qwen", "flash_varlen", Shapes(2, 4608), "cuda:sm90", True, "wrong results"),
        ("hunyuan", "flash_varlen", VIDEO, "cuda:sm90", True, "in every layer"),
        ("flux", "_flash_varlen_3", VIDEO, "cuda:sm90", True, "in every layer"),
        ("hunyuan", "flash_varlen_hub", VIDEO, "cuda:sm90", True, "in every layer"),
        ("flux", "flash", Shapes(1, 64, torch.float32), "cuda:sm90", True, "torch.float32"),
        ("flux", "_native_cudnn", Shapes(1, 64, torch.float32), "cuda:sm90", True, "torch.float32"),
        ("flux", "_native_efficient", Shapes(1, 64), "cuda:sm75", True, "torch.bfloat16"),
        ("flux", "native", Shapes(1, 17056, torch.float64), "cuda:sm90", True, "no fused kernel.*52 GiB"),
        ("flux", "flash", VIDEO, "cuda:sm75", True, "8.0 to 12.1, got 7.5"),
        ("flux", "_flash_3_hub", VIDEO, "cuda:sm80", True, "9.0 to 9.0, got 8.0"),
        ("flux", "flash_4_hub", VIDEO, "cuda:sm100", True, "names no backward"),
        ("flux", "flash", VIDEO, "cpu", True, "runs on cuda, not on cpu"),
        ("flux", "flex", Shapes(1, 64), "cpu", True, "on the CPU"),
        ("flux", "_native_npu", VIDEO, "cuda:sm90", True, "runs on npu"),
        ("flux", "_native_xla", VIDEO, "cuda:sm90", True, "runs on xla"),
        ("flux", "aiter_fa2_hub", VIDEO, "cuda:sm90", False, "AMD"),
        ("flux", "fastest", VIDEO, "cuda:sm90", True, 'backend: got "fastest", want one of '),
    ],
)
@pytest.mark.usefixtures("installed")
def test_refused(family: str, backend: str, shapes: Shapes, device: str, training: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        attention.check(real(family), backend, shapes, device, training)
    assert str(refused.value).startswith(f'backend: got "{backend}"')


@pytest.mark.parametrize(
    ("head_dim", "backend", "device", "message"),
    [
        (12, "_native_efficient", "cuda:sm80", "multiples of 8"),
        (160, "_native_cudnn", "cuda:sm90", "up to 128, got 160"),
        (264, "flash", "cuda:sm80", "up to 256, got 264"),
        (208, "_native_flash", "cuda:sm89", "cannot train head sizes"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_head_sizes(head_dim: int, backend: str, device: str, message: str) -> None:
    model = real("wan", num_attention_heads=2, attention_head_dim=head_dim)
    with pytest.raises(ValueError, match=message):
        attention.check(model, backend, Shapes(1, 64), device, True)
    assert attention.check(real("wan"), backend, Shapes(1, 64), device, True).backend == backend


@pytest.mark.parametrize("backend", [name for name in BACKENDS if FACTS[name].package])
def test_missing_libraries_are_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries(monkeypatch, False)
    with pytest.raises(RuntimeError):
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(backend))
    choices = [attention.choose(real("flux"), VIDEO, f"cuda:sm{sm}", False) for sm in (80, 90, 100, 120)]
    if FACTS[backend].device == "cuda" and FACTS[backend].syncs != "always":
        assert any(f"needs {FACTS[backend].package}" in reason(choice, backend) for choice in choices)
    assert all(backend not in choice.order for choice in choices)


def test_scores_limit() -> None:
    shapes, model = Shapes(1, 1024, torch.float64), real("flux")
    size = 24 * 1024**2 * 8 / 2**30
    assert attention.choose(model, shapes, "cuda:sm90", True, max_scores_gib=size).kernel == "math"
    with pytest.raises(ValueError, match="want what some attention backend takes"):
        attention.choose(model, shapes, "cuda:sm90", True, max_scores_gib=0.99 * size)


def test_reference_figures_of_hunyuan_video() -> None:
    memory = attention.choose(real("hunyuan"), VIDEO, "cuda:sm90", True).memory
    assert_as_printed(memory.scores / 2**30, "26.0")
    assert_as_printed(memory.scores / 2 / 2**30, "13.0")
    assert memory.query == 17056 * 3072 * 2


@pytest.mark.parametrize("degree", ["ring", "ulysses"])
def test_context_parallelism(degree: str) -> None:
    model = real("flux")
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2 if degree == "ring" else 1))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._parallel_config = config
    choice = attention.choose(model, VIDEO, "cuda:sm90", True)
    assert choice.backend == ("_native_cudnn" if degree == "ring" else "native")
    assert "does not support context parallelism" in reason(choice, "_native_efficient")


def test_cudnn_is_not_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        choice = attention.choose(real("flux"), VIDEO, "cuda:sm90", True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.kernel == "FA2" and "deterministic" in reason(choice, "_native_cudnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "device: got 'tpu', want a CPU or NVIDIA device"),
        ({"device": "meta"}, "device: got 'meta'"),
        ({"device": 3.5}, "device: got 3.5"),
        ({"device": "cuda:sm9"}, "device: got 'cuda:sm9'"),
        ({"training": "yes"}, 'training: got "yes", want True or False'),
        ({"hub_kernels": 1}, "hub_kernels: got 1"),
        ({"max_scores_gib": float("nan")}, "max_scores_gib: got nan"),
        ({"max_scores_gib": -1}, "max_scores_gib: got -1"),
        ({"shapes": (1, 2)}, r"shapes: got \(1, 2\), want attention.Shapes"),
        ({"model": nn.Linear(2, 2)}, "model: got Linear, want one of diffusers' HunyuanVideo"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": real("flux"), "shapes": VIDEO, "device": "cpu", "training": True}
    with pytest.raises(ValueError, match=message):
        attention.choose(**arguments | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "shapes.batch: got 0, want an int of at least 1"),
        ({"tokens": 1.5}, "shapes.tokens: got 1.5"),
        ({"batch": True}, "shapes.batch: got True"),
        ({"dtype": torch.int8}, "shapes.dtype: got torch.int8"),
        ({"equal_text": None}, "shapes.equal_text: got None"),
    ],
)
def test_bad_shapes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes(**{"batch": 1, "tokens": 1} | arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks where no GPU is")
def test_a_gpu_that_is_not_here_has_to_be_described() -> None:
    with pytest.raises(ValueError, match=r"torch sees no CUDA device.*cuda:sm90"):
        attention.choose(real("flux"), VIDEO, torch.device("cuda"), True)


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_backend_trains_with_the_native_result(family: str) -> None:
    model, inputs = TINY[family].model(), TINY[family].inputs()
    wanted = run(model, inputs)
    choice = attention.choose(model, Shapes(2, 64, torch.float32), torch.device("cpu"), True)
    undo = attention.apply(model, choice)
    assert_same_bits(run(model, inputs), wanted)
    undo()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_usable_backend_of_the_cpu_computes_the_same(family: str) -> None:
    model, inputs = TINY[family].model().double(), doubled(TINY[family].inputs())
    wanted = run(model, inputs)
    shapes = Shapes(2, 64, torch.float64)
    for backend in attention.choose(model, shapes, "cpu", True).order:
        undo = attention.apply(model, attention.check(model, backend, shapes, "cpu", True))
        output, grads = run(model, inputs)
        undo()
        assert_same_formula(output, wanted[0])
        for key, grad in wanted[1].items():
            if grad is not None:
                assert_same_formula(grads[key], grad)


def test_ragged_text_runs_under_a_backend_without_masks() -> None:
    model = TINY["hunyuan"].model()
    accelerate(model, "fast", trim_text=True)
    inputs = hunyuan_inputs(torch.float32, 2, lengths=(5, 3))
    wanted = run(model, inputs)
    shapes = Shapes(2, 25, torch.float32)
    attention.apply(model, attention.check(model, "_native_flash", shapes, "cpu", True))
    assert_same_bits(run(model, inputs), wanted)
    # HunyuanVideo takes as many tokens from the start as are valid.
    inputs["encoder_attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="`attn_mask` is not supported"):
        run(model, inputs)


def test_apply_leaves_other_models_alone_and_is_undone() -> None:
    registry = dispatch._AttentionBackendRegistry
    model, other = TINY["flux"].model(), TINY["flux"].model()
    before = registry._active_backend
    undo = attention.apply(model, attention.check(model, "_native_math", Shapes(2, 19), "cpu", True))
    told = [block.attn.processor._attention_backend for block in model.transformer_blocks]
    assert told == ["_native_math"] * 2
    assert registry._active_backend == before
    assert all(block.attn.processor._attention_backend is None for block in other.transformer_blocks)
    undo()
    assert all(block.attn.processor._attention_backend is None for block in model.transformer_blocks)


def test_apply_refuses_what_is_not_a_choice() -> None:
    with pytest.raises(ValueError, match="choice: got 'flash', want"):
        attention.apply(TINY["flux"].model(), "flash")  # type: ignore[arg-type]


def test_apply_changes_nothing_where_diffusers_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = TINY["flux"].model(), dispatch._AttentionBackendRegistry._active_backend
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
        choice = attention.check(model, "flash", Shapes(2, 19), "cuda:sm80", True)
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", False)
    with pytest.raises(RuntimeError, match="flash"):
        attention.apply(model, choice)
    assert model.transformer_blocks[0].attn.processor._attention_backend is None
    assert dispatch._AttentionBackendRegistry._active_backend == before


def test_wrapped_models() -> None:
    peft = pytest.importorskip("peft")
    model = TINY["flux"].model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"]))
    choice = attention.choose(wrapped, Shapes(2, 19, torch.float32), "cpu", True)
    attention.apply(wrapped, choice)
    assert model.transformer_blocks[0].attn.processor._attention_backend == "native"
