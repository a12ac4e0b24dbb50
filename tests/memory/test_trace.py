"""Predictions against real runs on the CPU, and those against what torch's allocator tells."""

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dancegrpo_fast.activations.operators import cpu_workspace
from dancegrpo_fast.lora import add_lora
from dancegrpo_fast.memory.trace.fake import CudaOperators
from dancegrpo_fast.memory.trace.result import Trace
from dancegrpo_fast.memory.trace.tracer import measure, trace
from dancegrpo_fast.patch import _pieces, accelerate

from ..release import release_but
from .small import tiny


def assert_same_books(predicted: Trace, measured: Trace) -> None:
    assert predicted.peak == measured.peak
    assert predicted.saved_by_group == measured.saved_by_group
    assert predicted.saved_by_module == measured.saved_by_module
    assert predicted.flops_by_group == measured.flops_by_group
    for phase in measured.phases:
        assert predicted.live(phase) == measured.live(phase)
        assert predicted.peak_of(phase).by_category == measured.peak_of(phase).by_category


def predicted(model: Any, inputs: dict[str, Any], **settings: Any) -> Trace:
    """The trace, whose books are those of a real run."""
    found = trace(model, inputs, attention="cpu", **settings)
    assert_same_books(found, measure(model, inputs, **settings))
    return found


@pytest.mark.parametrize("family", release_but(("flux", "unet"), ["flux", "hunyuan", "sd3.5", "qwen", "wan", "unet"]))
@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [pytest.param(torch.float32, False, marks=pytest.mark.release), (torch.bfloat16, True)],
)
def test_prediction_is_what_a_real_run_takes(family: str, dtype: torch.dtype, checkpointing: bool) -> None:
    model, inputs = tiny(family, dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert bool(predicted(model, inputs, optimizer="foreach").live("forward").get("block_inputs")) == checkpointing


@pytest.mark.parametrize("checkpointing", release_but((True,), [False, True]))
def test_prediction_with_lora_is_what_a_real_run_takes(checkpointing: bool) -> None:
    pytest.importorskip("peft")
    model, inputs = tiny("hunyuan")
    add_lora(model, 4, 4, ["to_q", "to_k", "to_v", "to_out.0"])
    if checkpointing:
        model.enable_gradient_checkpointing()
    load = predicted(model, inputs, optimizer="fused").live("load")
    assert load["gradients"] < load["parameters"]


@pytest.mark.parametrize("recompute", release_but(("all",), ["none", "gelu", "all"]))
def test_prediction_with_block_ops_is_what_a_real_run_takes(recompute: str) -> None:
    model, inputs = tiny("flux")
    accelerate(model, recompute=recompute)
    predicted(model, inputs)


@pytest.mark.parametrize("block_ops", release_but((True,), [False, True]))
def test_prediction_of_cudas_autocast_is_what_its_casts_take(block_ops: bool) -> None:
    """They run on the CPU too, with attention taken apart."""
    model, inputs = tiny("hunyuan")
    if block_ops:
        accelerate(model)
    traced = trace(model, inputs, attention="math", autocast=torch.bfloat16)
    in_float = mock.patch.object(_pieces, "_norm_dtype", lambda _: torch.float32)
    with CudaOperators("math", fused_norm=False), in_float:
        assert_same_books(traced, measure(model, inputs, autocast=torch.bfloat16))


def test_block_ops_keep_on_cuda_what_they_keep_on_the_cpu() -> None:
    """All but attention, in bfloat16 without autocast."""
    model, inputs = tiny("flux", torch.bfloat16)
    accelerate(model, "fast", recompute="all", gates_from_weights=True)
    traced, measured = trace(model, inputs), measure(model, inputs)
    for group in ("matmul", "activation", "rope", "elementwise"):
        assert traced.saved_by_group.get(group) == measured.saved_by_group.get(group)
    # Mean and deviation of the model's own last norm are float32 there.
    wider = 2 * 2 * inputs["hidden_states"].shape[:2].numel()
    assert traced.saved_by_group["norm"] == measured.saved_by_group["norm"] + wider
    # Products with float32 results there are products of float32 copies here.
    assert traced.flops_by_group["backward"]["matmul"] == measured.flops_by_group["backward"]["matmul"]
    assert traced.bytes_by_group["backward"]["cast"] < measured.bytes_by_group["backward"]["cast"]


@pytest.mark.parametrize("mode", release_but(("lossless",), ["lossless", "fast"]))
def test_prediction_with_lora_in_block_ops_is_what_a_real_run_takes(mode: str) -> None:
    pytest.importorskip("peft")
    model, inputs = tiny("flux", torch.bfloat16)
    add_lora(model, 4, 4, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"])
    accelerate(model, mode, recompute="all")
    found = predicted(model, inputs)
    # Layers that read the same tokens keep them once: as much as without LoRA, and what is as wide as the rank.
    assert any(op.endswith("lora_linear" if mode == "fast" else "lora_update") for op in _ops(found))


def _ops(found: Trace) -> set[str]:
    return {storage.op for storage in found.storages}


LORA_DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]


@pytest.mark.parametrize("dtypes", release_but(LORA_DTYPES[:1], LORA_DTYPES), ids=str)
def test_workspace_of_a_lora_update_is_what_the_allocator_tells(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    ops, rows = torch.ops.dgf, 256
    for inputs, outputs in ((96, 64), (64, 96), (512, 32)):
        base, x = (torch.randn(rows, n).to(dtypes[0]) for n in (outputs, inputs))
        down, up = torch.randn(2, inputs, dtype=dtypes[1]), torch.randn(outputs, 2, dtype=dtypes[1])
        inner = torch.randn(rows, 2, dtype=dtypes[1])
        for op, args in (
            (ops.lora_update, (base, x, down, up, 0.3)),
            (ops.lora_update_backward, (base, x, inner, down, up, 1.0, [True, True, True])),
        ):
            made = op(*args)
            within = cpu_workspace(op.default, args, made)
            _, peak = _told(lambda op=op, args=args: op(*args))
            # What is as wide as the rank is left out.
            narrow = 3 * inner.nbytes + 2 * (down.nbytes + up.nbytes)
            assert 0 <= peak - within - sum(t.nbytes for t in made) + narrow <= 2 * narrow, (op, inputs, outputs)


def test_rollout_keeps_nothing() -> None:
    found = predicted(*tiny("flux"), train=False)
    assert found.kept == [] and set(found.phases) == {"load", "rollout"}


def _allocator(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """Bytes after the forward and at the peak, by what torch's allocator tells its profiler."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def run() -> None:
        output = model(**inputs)[0]
        with torch.profiler.record_function("forward is over"):
            pass
        torch.autograd.backward([output], [torch.ones_like(output)])

    return _told(run)


def _told(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes when the forward is over, and at the peak."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = run()
    del result
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = peak = kept = 0
    for event in events:
        if event.name() == "forward is over":
            kept = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return kept, peak


@pytest.mark.parametrize("family", release_but(("flux",), ["flux", "sd3.5", "wan"]))
@pytest.mark.parametrize("checkpointing", release_but((True,), [False, True]))
def test_prediction_is_what_the_allocator_tells(family: str, checkpointing: bool) -> None:
    """Peaks without checkpointing in float32, and kept bytes with it in bfloat16, too."""
    model, inputs = tiny(family, torch.bfloat16 if checkpointing else torch.float32)
    if checkpointing:
        model.enable_gradient_checkpointing()
    traced = trace(model, inputs, attention="cpu")
    kept, peak = _allocator(model, inputs)
    load = sum(traced.live("load").values())
    # Each checkpoint also keeps the state of the CPU's random numbers, which is no tensor of the model's.
    blocks = sum(type(m).__name__.endswith("TransformerBlock") for m in model.modules()) if checkpointing else 0
    assert sum(traced.live("forward").values()) - load + blocks * torch.get_rng_state().nbytes == kept
    assert checkpointing or traced.peak.bytes - load == peak
