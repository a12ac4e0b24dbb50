"""Varlen kernels for prompts of unequal length: which, and how they are called; here functions stand in for them."""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dancegrpo_fast as dgf
from dancegrpo_fast.activations.checkpointing import blocks_of
from dancegrpo_fast.activations.operators import group
from dancegrpo_fast.patch import _ragged
from dancegrpo_fast.patch._ragged import varlen_place

from ..tolerances import assert_within_budget
from .models import assert_gradients_within_budget, doubled, run
from .ragged import BF16, F32, made, output


def attention_of(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """Each sequence for itself, `[T, H, D]`."""
    parts = (t.tensor_split(ends[1:-1].long()) for t in (q, k, v))
    each = [(t.transpose(0, 1)[None] for t in one) for one in zip(*parts, strict=True)]
    return torch.cat([F.scaled_dot_product_attention(*one)[0].transpose(0, 1) for one in each])


# The functions' arguments, as their packages have them: flash-attn 2.6.3 and later, and flash-attn 3.
def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    return seen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    # Its first releases return the log-sum-exp, too.
    return seen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


CALLS: list[tuple[list[int], int]] = []


def seen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, longest_k: int) -> Tensor:
    assert ends is ends_k and ends.dtype == torch.int32 and longest == longest_k
    assert q.ndim == 3 and len(q) == ends[-1]
    CALLS.append((ends.tolist(), longest))
    return attention_of(q, k, v, ends)


def torchs(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return seen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every package were there, on a device of compute capability 8.0."""
    from diffusers.models import attention_dispatch as dispatch

    CALLS.clear()
    for module, name, function in (
        (*_ragged._FLASH_2, flash_2),
        (*_ragged._FLASH_3, flash_3),
        (*_ragged._TORCH, torchs),
    ):
        stand_in = ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)
    for name in ("flash_varlen_hub", "_flash_3_varlen_hub"):
        config = dispatch._HUB_KERNELS_REGISTRY[dispatch.AttentionBackendName(name)]
        monkeypatch.setattr(config, "kernel_fn", flash_3 if "3" in name else flash_2)
    monkeypatch.setattr(_ragged, "_capability", lambda _: (8, 0))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "backend"), [*(("hunyuan", each) for each in _ragged.VARLEN), ("qwen", "flash"), ("qwen", "native")]
)
def test_ragged_in_one_call_of_a_varlen_kernel(name: str, backend: str) -> None:
    model, inputs = made(name, dtype=BF16)
    undo = dgf.accelerate(model, "fast", trim_text=False)
    masked = run(model, inputs)
    undo()
    dgf.accelerate(model, "fast")
    for block in blocks_of(model):
        block.attn.processor._attention_backend = backend
    found = run(model, inputs)
    image = (18, 24)[name == "qwen"]
    ends = [0, image + 5, 2 * image + 8, 3 * image + 15]
    assert [(ends, image + 7)] * len(blocks_of(model)) == CALLS
    truth = run(made(name)[0].double(), doubled(inputs))
    assert_within_budget(found[0], truth[0], masked[0])
    assert_gradients_within_budget(found[1], truth[1], masked[1])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["flash_varlen", "_flash_varlen_3", "native"])
def test_one_sample_goes_where_its_backend_goes(backend: str) -> None:
    """Alone it runs the kernel that a batch runs, as another one may have other bits."""
    model, inputs = made("hunyuan", (5,), BF16)
    dgf.accelerate(model, "fast")
    for block in blocks_of(model):
        block.attn.processor._attention_backend = backend
    output(model, inputs)
    assert CALLS == [([0, 23], 23)] * 4


@pytest.mark.skipif(not _ragged._has_varlen(), reason="this torch has no varlen attention")
def test_torchs_varlen_takes_what_it_is_given() -> None:
    varlen: Callable[..., Any] = _ragged._varlen(_ragged._TORCH)
    bound = inspect.signature(varlen).bind("q", "k", "v", "ends", "ends", 9, 9)
    assert list(bound.arguments) == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    for stand_in in (flash_2, flash_3):
        assert list(inspect.signature(stand_in).bind(*range(7)).arguments)[3:5] == ["cu_seqlens_q", "cu_seqlens_k"]


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "head_dim", "place"),
    [
        ("native", (8, 0), BF16, 128, _ragged._TORCH),
        ("native", (9, 0), BF16, 128, None),
        ("native", (10, 0), BF16, 128, None),
        ("native", (12, 0), BF16, 128, _ragged._TORCH),
        ("_native_flash", (9, 0), BF16, 128, _ragged._TORCH),
        ("flash", (9, 0), torch.float16, 64, _ragged._FLASH_2),
        ("_flash_varlen_3", (9, 0), BF16, 128, _ragged._FLASH_3),
        ("_flash_3", (9, 0), BF16, 128, None),
        ("flash", (8, 0), F32, 128, None),
        ("flash", (8, 0), BF16, 12, None),
        ("flash", (8, 0), BF16, 264, None),
        ("native", (0, 0), BF16, 128, None),
        ("flex", (8, 0), BF16, 128, None),
        ("_native_cudnn", (9, 0), BF16, 128, None),
    ],
)
def test_which_kernel(backend: str, capability: tuple[int, int], dtype: Any, head_dim: int, place: Any) -> None:
    wanted = None if place == _ragged._TORCH and not _ragged._has_varlen() else place
    assert varlen_place(backend, capability, dtype, head_dim) == wanted


@pytest.mark.parametrize("absent", ["module", "own kernel"])
def test_without_torchs_varlen(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if absent == "module":
        monkeypatch.setitem(sys.modules, _ragged._TORCH[0], None)
        monkeypatch.setattr(_ragged, "_there", _ragged._there.__wrapped__)
    else:
        monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3", raising=False)
    assert varlen_place("native", (8, 0), BF16, 128) is None
    assert varlen_place("flash", (8, 0), BF16, 128) == _ragged._FLASH_2


@pytest.mark.parametrize(
    "op", ["torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd"]
)
def test_policies_know_varlen_kernels(op: str) -> None:
    assert group(op) == "attention"
