"""What a trace says of models whose books can be kept by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.trace.result import Trace
from dancegrpo_fast.memory.trace.tracer import measure, trace
from dancegrpo_fast.patch import accelerate

from ..memory.small import tiny
from ..release import release_but


def _layers() -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 4, bias=False))
    return model, {"input": torch.empty(16, 8)}


def test_books_of_three_layers() -> None:
    model, inputs = _layers()
    found = trace(model, inputs, optimizer="fused")
    weights, hidden, output = 4 * (8 * 32 + 32 * 4), 4 * 16 * 32, 4 * 16 * 4
    # Step counts are float32 numbers.
    assert found.live("load") == {
        "optimizer": 2 * weights + 2 * 4,
        "parameters": weights,
        "gradients": weights,
        "inputs": 4 * 16 * 8,
    }
    assert found.saved_by_group == {"matmul": hidden, "activation": hidden}
    assert found.saved_by_module == {"0": hidden, "1": hidden}
    assert found.live("forward")["outputs"] == output
    assert found.live("optimizer") == found.live("load")
    flops = 2 * 16 * (8 * 32 + 32 * 4)
    assert found.flops_by_group["forward"] == {"matmul": flops}
    # The input needs no gradient.
    assert found.flops_by_group["backward"] == {"matmul": 2 * flops - 2 * 16 * 8 * 32}
    assert found.bytes_by_group["forward"] == {"activation": 2 * hidden}
    backward = {(s.op, s.module, s.size) for s in found.storages if s.phase == "backward" and s.op != "aten.ones_like"}
    assert backward == {
        ("aten.mm", "2", 4 * 32 * 4),
        ("aten.mm", "2", hidden),
        ("aten.gelu_backward", "1", hidden),
        ("aten.mm", "0", 4 * 8 * 32),
    }
    # The last layer's backward has GELU's input and output, two gradients of its own, and from outside the output's.
    activations = 3 * hidden + 4 * 32 * 4 + 2 * output
    assert found.peak_of("backward").bytes == sum(found.live("load").values()) + activations
    assert found.peak_of("backward").module == "2"
    assert found.timeline[-1] == sum(found.live("load").values()) == sum(event.size for event in found.events)


def test_first_gradients_are_no_temporaries() -> None:
    model, inputs = _layers()
    found = trace(model, inputs, grads=False)
    assert "gradients" not in found.live("load")
    assert found.live("backward")["gradients"] == found.live("load")["parameters"]


@pytest.mark.release
def test_foreach_takes_more_than_fused() -> None:
    model, inputs = _layers()
    peaks = {kind: trace(model, inputs, optimizer=kind).peak_of("optimizer") for kind in ("fused", "foreach")}
    weights = peaks["fused"].by_category["parameters"]
    assert peaks["foreach"].bytes - peaks["fused"].bytes >= weights
    assert peaks["fused"].by_category.get("temporaries", 0) == 0


class _Attention(nn.Module):
    def __init__(self, width: int, mask: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool, device=x.device) if self.mask else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attention(backend: str, tokens: int = 256, dtype: torch.dtype = torch.bfloat16, mask: bool = False) -> Trace:
    with torch.device("meta"):
        model = _Attention(128, mask).to(dtype)
        return trace(model, {"x": torch.empty(2, tokens, 128, dtype=dtype)}, attention=backend)


@pytest.mark.release
def test_only_math_keeps_scores() -> None:
    scores = 2 * 2 * 4 * 256 * 256
    rows = 2 * 256 * 128 * 2
    for backend in ("flash", "efficient", "cudnn"):
        found = _attention(backend)
        ops = {s.op for s in found.storages if s.group == "attention"}
        assert ops == {f"aten._scaled_dot_product_{backend}_attention{end}" for end in ("", "_backward")}
        # Queries, keys and values in one; beside them row sums and random states, the output being the model's own.
        assert 3 * rows <= found.kept_bytes < 3 * rows + scores // 4
    assert _attention("math").kept_bytes >= 3 * rows + scores


@pytest.mark.release
def test_backward_of_attention_takes_float32_sums() -> None:
    for backend in ("flash", "efficient", "cudnn"):
        [found] = [s for s in _attention(backend, tokens=250).storages if s.category == "workspace"]
        assert found.size == 4 * 2 * 4 * 256 * (32 + 1) and found.phase == "backward"


@pytest.mark.release
def test_masks_and_float32_leave_flash() -> None:
    for found in (_attention("flash", mask=True), _attention("flash", dtype=torch.float32)):
        assert any(s.op == "aten._scaled_dot_product_efficient_attention" for s in found.storages)
        assert not any("flash" in s.op for s in found.storages)


def test_function_modes_reach_what_a_checkpoint_computes_again() -> None:
    model, inputs = tiny("flux", torch.bfloat16)
    model.enable_gradient_checkpointing()
    found = trace(model, inputs)
    again = [s for s in found.storages if s.recomputed and "flash" in s.op]
    assert again and {s.category for s in again} <= {"recomputation"}
    assert found.flops_by_group["recompute"]["attention"] == found.flops_by_group["forward"]["attention"]


def test_autocast_normalises_in_float32_as_on_cuda() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    found = trace(model, {"input": torch.empty(16, 8)}, autocast=torch.bfloat16)
    [norm] = [s for s in found.storages if s.op == "aten.native_layer_norm" and s.size >= 16 * 8]
    assert norm.size == 4 * 16 * 8
    assert found.live("forward")["outputs"] == 2 * 16 * 8


def test_block_ops_drop_what_they_compute_again() -> None:
    kept = {}
    for recompute in ("none", "gelu", "all"):
        model, inputs = tiny("flux")
        accelerate(model, recompute=recompute)
        found = trace(model, inputs)
        kept[recompute] = found.kept_bytes
        # GELU alone is computed again inside its op.
        assert any(s.category == "recomputation" for s in found.storages) == (recompute == "all")
    assert kept["none"] > kept["gelu"] > kept["all"]


@pytest.mark.parametrize("family", release_but(("flux",), ["flux", "qwen"]))
def test_models_are_left_as_they_were(family: str) -> None:
    model, inputs = tiny(family)
    tensors = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trace(model, inputs, optimizer="fused")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, p in model.named_parameters():
        assert id(p) == tensors[name][0] and torch.equal(p, tensors[name][1]) and p.grad is None
    measure(model, inputs, optimizer="fused")
    assert all(torch.equal(p, tensors[name][1]) for name, p in model.named_parameters())


def test_any_method_can_be_called() -> None:
    vae = specs.build_vae(specs.resolve("sd14"))
    latents = torch.empty(1, 4, 16, 16, dtype=torch.bfloat16, device="meta")
    found = trace(vae, {"z": latents}, call=vae.decode, train=False)
    assert found.live("rollout")["outputs"] == 2 * 3 * 128 * 128
    assert found.peak.module.startswith("decoder.")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, x: trace(m, x, attention="sage"), 'attention: got "sage", want one of flash, efficient'),
        (lambda m, x: trace(m, x, optimizer="sgd"), 'optimizer: got "sgd", want None, fused or foreach'),
        (lambda m, x: trace(m.requires_grad_(False), x), "train: got True for a model whose output needs no gradient"),
        (lambda m, x: measure(m.requires_grad_(False), x, optimizer="fused"), "optimizer: got a model without"),
        (lambda m, x: trace(m, x).live("rollout"), 'phase: got "rollout", want one of load, forward, backward'),
    ],
)
def test_bad_settings_are_refused(run: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*_layers())
