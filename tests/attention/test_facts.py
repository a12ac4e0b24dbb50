"""What the table of attention backends and masks says is what the installed diffusers and torch do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dancegrpo_fast.attention import choice as attention
from dancegrpo_fast.attention.choice import Shapes
from dancegrpo_fast.attention.facts import COPIED_MASK, FACTS, HALF, MASKS, NO_MASK

from ..patch.models import TINY
from .test_choice import BACKENDS, dispatch, real


def test_every_backend_of_this_diffusers_is_judged() -> None:
    assert set(FACTS) == set(BACKENDS) == {name.value for name in dispatch._AttentionBackendRegistry.list_backends()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_dtype_facts(backend: str) -> None:
    name = dispatch.AttentionBackendName(backend)
    facts = FACTS[backend]
    checks = {getattr(check, "__name__", "") for check in dispatch._AttentionBackendRegistry._constraints[name]}
    if any("bf16" in check for check in checks):
        assert facts.dtypes == HALF
    assert facts.hub == (name in dispatch._HUB_KERNELS_REGISTRY)
    x = torch.zeros(1, 4, 1, 64)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    if facts.mask == NO_MASK:
        with pytest.raises(ValueError, match=r"mask.* is not supported"):
            dispatch._AttentionBackendRegistry._backends[name](x, x, x, attn_mask=mask)


def test_flash_3_op_has_no_autograd_formula_and_sage_no_backward() -> None:
    assert dispatch._wrapped_flash_attn_3._backward_fn is None
    with pytest.raises(NotImplementedError):
        dispatch._sage_attention_backward_op(None, None)


def test_xformers_adds_a_full_mask_of_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_: Any) -> Tensor:
        seen.append(mask)
        return q

    monkeypatch.setattr(dispatch, "xops", SimpleNamespace(memory_efficient_attention=record))
    x = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    dispatch._xformers_attention(x, x, x, attn_mask=torch.tensor([True, True, False, True]).view(1, 1, 1, 4))
    assert FACTS["xformers"].mask == COPIED_MASK
    assert seen[0].shape == (1, 2, 4, 4) and seen[0].is_contiguous()
    assert seen[0][0, 0, 0].tolist() == [1, 1, 0, 1]


def test_flash_varlen_keeps_leading_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def record(q: Tensor, k: Tensor, **_: Any) -> Tensor:
        seen.append(k)
        return q

    hub = dispatch._HUB_KERNELS_REGISTRY[dispatch.AttentionBackendName.FLASH_VARLEN_HUB]
    for name in ("flash_attn_varlen_func", "flash_attn_3_varlen_func", "sageattn_varlen"):
        monkeypatch.setattr(dispatch, name, record)
    monkeypatch.setattr(hub, "kernel_fn", record)
    x = torch.arange(4.0).view(1, 4, 1, 1)
    mask = torch.tensor([True, False, True, True]).view(1, 1, 1, 4)
    functions = dispatch._AttentionBackendRegistry._backends
    leading = [name for name, facts in FACTS.items() if facts.valid_keys_lead]
    for name in (*leading, "flash_varlen_hub"):
        functions[dispatch.AttentionBackendName(name)](x, x, x, attn_mask=mask)
        assert seen.pop().flatten().tolist() == ([0, 1, 2] if name in leading else [0, 2, 3])


class Masks(TorchFunctionMode):
    """The masks that attention gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor | None] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.seen.append((kwargs or {}).get("attn_mask"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("family", TINY)
def test_which_families_mask(family: str) -> None:
    model, masks = TINY[family].model(), Masks()
    with masks, torch.no_grad():
        model(**TINY[family].inputs())
    rule = MASKS[type(model).__name__]
    found = [mask for mask in masks.seen if mask is not None]
    assert bool(found) == (rule.when != "never")
    keys = [mask.flatten(1).long() for mask in found if mask.shape[1:3] == (1, 1)]
    if any(bool((~mask.bool()).any()) for mask in keys):
        assert all(bool((mask.diff(dim=1) <= 0).all()) for mask in keys) == rule.valid_keys_lead


@pytest.mark.parametrize(
    ("backend", "op", "dtype", "device"),
    [
        ("_native_cudnn", "cudnn", torch.bfloat16, "cuda:sm90"),
        ("_native_flash", "flash", torch.bfloat16, "cuda:sm90"),
        ("_native_efficient", "efficient", torch.bfloat16, "cuda:sm90"),
        ("_native_efficient", "efficient", torch.float32, "cuda:sm80"),
    ],
)
def test_memory_is_what_torchs_kernels_return(backend: str, op: str, dtype: torch.dtype, device: str) -> None:
    shapes = Shapes(batch=2, tokens=77, dtype=dtype)
    memory = attention.check(real("flux"), backend, shapes, device, True).memory
    q, k, v = torch.empty(3, 2, 24, 77, 128, dtype=dtype, device="meta")
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{op}_attention")
    out, lse, *_ = function(q, k, v) if op == "flash" else function(q, k, v, None, True)
    assert (memory.query, memory.key, memory.value) == (q.nbytes, k.nbytes, v.nbytes)
    assert (memory.out, memory.lse, memory.mask) == (out.nbytes, lse.nbytes, 0)
    assert memory.saved == sum(x.nbytes for x in (q, k, v, out, lse))
    assert memory.workspace == 4 * q.numel()
    assert attention.check(real("flux"), backend, shapes, device, False).memory.saved == 0


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux", "hunyuan"])
def test_memory_is_what_the_cpu_saves(family: str, backend: str, dtype: torch.dtype) -> None:
    model = TINY[family].model()
    layer = model.transformer_blocks[0].attn
    heads, dim = layer.heads, layer.inner_dim // layer.heads
    memory = attention.check(model, backend, Shapes(2, 40, dtype), "cpu", True).memory
    q, k, v = (torch.randn(2, 40, heads, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool) if family == "hunyuan" else None
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask, backend=dispatch.AttentionBackendName(backend))
    assert out.requires_grad
    assert memory.saved == sum(saved.values())
