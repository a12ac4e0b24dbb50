"""Prompts of unequal length in one batch, without a mask: values, bits, kernels and what is kept."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dancegrpo_fast as dgf
from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.activations.checkpointing import blocks_of
from dancegrpo_fast.activations.operators import group
from dancegrpo_fast.patch import _ragged
from dancegrpo_fast.patch._ragged import Lengths, Ragged, packed, varlen_place

from ..ops.block_cases import held
from ..release import release_but
from ..tolerances import assert_within_budget
from .models import TINY, Inputs, assert_gradients_within_budget, assert_same_bits, doubled, run

BF16, F32 = torch.bfloat16, torch.float32
MASKS = {"hunyuan": "encoder_attention_mask", "qwen": "encoder_hidden_states_mask"}
# Of a batch of three; the text has room for seven.
LENGTHS = (5, 3, 7)
CASES = ("hunyuan", "hunyuan token replace", "skyreels", "qwen", "qwen two conditions")


def mask_of(name: str) -> str:
    return MASKS[name.split()[0].replace("skyreels", "hunyuan")]


def made(name: str, lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = F32) -> tuple[Any, Inputs]:
    inputs = TINY[name].inputs(dtype, len(lengths))
    inputs[mask_of(name)] = (torch.arange(7) < torch.tensor(lengths)[:, None]).to(inputs[mask_of(name)].dtype)
    return TINY[name].model(dtype), inputs


def output(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs, return_dict=False)[0].detach()


def rows(inputs: Inputs, index: list[int]) -> Inputs:
    """Some rows of every input."""
    return {k: v[index] if isinstance(v, Tensor) else [v[i] for i in index] for k, v in inputs.items()}


@contextmanager
def masks_seen(calls: int) -> Iterator[list[Tensor | None]]:
    """What torch's attention is given, but for the refiner's."""
    seen: list[Tensor | None] = []
    original = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("attn_mask"))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        yield seen
    del seen[:-calls]


class TestTokens:
    """Packing and unpacking."""

    VALID = (
        [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 1], [1, 1, 0, 1]],
        [[0, 1, 1], [1, 1, 0], [0, 0, 1]],
        [[1, 1], [1, 1]],
        [[1, 1, 1]],
    )

    @pytest.mark.parametrize("valid", VALID)
    def test_there_and_back(self, valid: list[list[int]]) -> None:
        mask = torch.tensor(valid, dtype=torch.bool)
        ragged = Ragged.of(mask, torch.device("cpu"))
        x = torch.randn(*mask.shape, 2, 3, dtype=torch.float64)
        assert torch.equal(ragged.pack(x), x[mask])
        assert torch.equal(ragged.unpack(ragged.pack(x)), x * mask[..., None, None])
        assert ragged.offsets.dtype == torch.int32
        assert ragged.offsets.tolist() == [0, *mask.sum(dim=1).cumsum(0).tolist()]
        assert ragged.whole is (mask.all().item() and len(mask) == 1)
        x.requires_grad_()
        for again in (False, True):
            assert torch.autograd.gradcheck(lambda t: ragged.unpack(packed(t, ragged, again)), (x,))  # noqa: B023

    def test_nothing_is_copied_without_padding(self) -> None:
        ragged, x = Ragged.of(torch.ones(2, 3, dtype=torch.bool), torch.device("cpu")), torch.randn(2, 3, 4)
        assert ragged.unpack(ragged.pack(x)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mode", ["fast", "lossless"])
@pytest.mark.parametrize("name", CASES)
def test_ragged_is_the_masked_model(name: str, mode: str) -> None:
    model, inputs = made(name)
    undo = dgf.accelerate(model, mode, trim_text=False)
    masked, calls = run(model, inputs), len(LENGTHS) * len(blocks_of(model))
    undo()
    dgf.accelerate(model, mode, trim_text=True)
    with masks_seen(calls) as seen:
        found = run(model, inputs)
    assert seen == [None] * calls
    truth = run(model.double(), doubled(inputs))
    assert_within_budget(found[0], truth[0], masked[0])
    assert_gradients_within_budget(found[1], truth[1], masked[1])


@pytest.mark.parametrize("lengths", [(5, 5), (7, 7), (1, 1), (4,), (7,)])
@pytest.mark.parametrize("name", MASKS)
def test_equal_lengths_and_one_sample(name: str, lengths: tuple[int, ...]) -> None:
    model, inputs = made(name, lengths)
    undo = dgf.accelerate(model, "fast", trim_text=False)
    masked = output(model, inputs)
    undo()
    dgf.accelerate(model, "fast")
    calls = len(lengths) * len(blocks_of(model))
    with masks_seen(calls) as seen:
        found = output(model, inputs)
    assert seen == [None] * calls
    assert_within_budget(found, output(model.double(), doubled(inputs)), masked)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", MASKS)
def test_a_samples_bits_depend_on_its_own_length(name: str, dtype: torch.dtype) -> None:
    """Whatever its neighbours are, and in whichever row: as many rows, so that products of matrices are alike."""
    model, inputs = made(name, dtype=dtype)
    dgf.accelerate(model, "fast")
    wanted = output(model, inputs)
    for index in ([1, 2, 0], [0, 0, 0], [2, 1, 1], [1, 0, 2]):
        assert torch.equal(output(model, rows(inputs, index)), wanted[index])
    with torch.no_grad():
        assert torch.equal(output(model, inputs), wanted)


@pytest.mark.parametrize("name", MASKS)
def test_lengths_are_read_once_a_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = _ragged._Read
    monkeypatch.setattr(_ragged, "_Read", lambda mask: reads.append(1) or read(mask))
    model, inputs = made(name)
    dgf.accelerate(model, "fast")
    model.enable_gradient_checkpointing()
    first = run(model, inputs)[0]
    assert len(reads) == 1
    run(model, inputs)
    assert len(reads) == 1
    inputs[mask_of(name)][:, 2:] = 0
    second = run(model, inputs)[0]
    assert len(reads) == 2 and not torch.equal(first, second)
    inputs[mask_of(name)] = inputs[mask_of(name)].clone()
    assert torch.equal(run(model, inputs)[0], second) and len(reads) == 3


@pytest.mark.parametrize("name", MASKS)
def test_ragged_gradients_through_checkpoints(name: str) -> None:
    model, inputs = made(name, dtype=BF16)
    dgf.accelerate(model, "fast", recompute="all")
    wanted = run(model, inputs)
    for policy, offload in (("full", False), ("full", True), ("attention", False), ("matmul", False)):
        undo = checkpointing.apply(model, policy, offload=offload)
        assert_same_bits(run(model, inputs), wanted)
        undo()


@pytest.mark.parametrize("name", MASKS)
def test_queries_and_keys_are_packed_again(name: str) -> None:
    model, inputs = made(name, dtype=BF16)
    kept, outputs = [], []
    for recompute in ("gelu", "all"):
        undo = dgf.accelerate(model, "fast", recompute=recompute)
        outputs.append(run(model, inputs))
        kept.append(held(lambda: model(**inputs, return_dict=False), but=model.parameters()))
        undo()
    assert_same_bits(*outputs)
    tokens = sum(LENGTHS) + len(LENGTHS) * (18 if name == "hunyuan" else 24)
    width = model.transformer_blocks[0].attn.inner_dim
    # Two bytes a number.
    assert kept[0] - kept[1] >= len(blocks_of(model)) * 2 * tokens * width * 2


def test_adapters_are_trained_through_packed_tokens() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = made("qwen")
    torch.manual_seed(2)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "add_v_proj"], init_lora_weights=False))
    undo = dgf.accelerate(model, "fast", trim_text=False)
    masked = run(model, inputs)
    undo()
    dgf.accelerate(model, "fast")
    found = run(model, inputs)
    truth = run(model.double(), doubled(inputs))
    assert found[1] and all("lora" in key for key in found[1])
    assert_gradients_within_budget(found[1], truth[1], masked[1])


class TestMasked:
    """Where the mask stays."""

    def same_as_masked(self, model: Any, inputs: Inputs) -> None:
        undo = dgf.accelerate(model, "fast", trim_text=False)
        wanted = output(model, inputs)
        undo()
        dgf.accelerate(model, "fast")
        assert torch.equal(output(model, inputs), wanted)

    def test_text_that_does_not_lead(self) -> None:
        """HunyuanVideo counts the valid tokens and takes so many from the start."""
        model, inputs = made("hunyuan")
        inputs["encoder_attention_mask"][0, :2] = 0
        self.same_as_masked(model, inputs)

    def test_any_pattern_of_qwen_is_packed(self) -> None:
        model, inputs = made("qwen")
        inputs["encoder_hidden_states_mask"][:, 1] = False
        undo = dgf.accelerate(model, "fast", trim_text=False)
        masked = output(model, inputs)
        undo()
        dgf.accelerate(model, "fast")
        with masks_seen(6) as seen:
            found = output(model, inputs)
        assert seen == [None] * 6
        assert_within_budget(found, output(model.double(), doubled(inputs)), masked)

    @pytest.mark.parametrize("name", MASKS)
    def test_context_parallelism(self, name: str) -> None:
        model, inputs = made(name)
        lengths = Lengths(text_first=name == "qwen", leading=name == "hunyuan")
        assert lengths(model, inputs[mask_of(name)], 9) is not None
        model.transformer_blocks[0].attn.processor._parallel_config = SimpleNamespace()
        assert lengths(model, inputs[mask_of(name)], 9) is None

    @pytest.mark.parametrize("name", MASKS)
    def test_fakes_cannot_be_read(self, name: str) -> None:
        from torch._subclasses import FakeTensorMode

        model, inputs = made(name)
        lengths = Lengths(text_first=True, leading=True)
        assert lengths(model, inputs[mask_of(name)].to("meta"), 9) is None
        assert lengths(model, FakeTensorMode().from_tensor(inputs[mask_of(name)]), 9) is None

    @pytest.mark.parametrize("name", release_but(("hunyuan",), MASKS))
    def test_compiled_models(self, name: str) -> None:
        """Blocks in one graph each, or all in one; one sample has no mask even so."""
        few = {"num_layers": 1} | ({"num_single_layers": 1} if name == "hunyuan" else {})

        def small() -> Any:
            return replace(TINY[name], changes=few).model()

        torch._dynamo.reset()
        inputs, masked, ragged, whole = made(name)[1], small(), small(), small()
        dgf.accelerate(masked, "fast", trim_text=False)
        dgf.accelerate(ragged, "fast")
        dgf.accelerate(whole, "fast")
        wanted, alone = output(masked, inputs), output(ragged, rows(inputs, [1]))
        assert not torch.equal(output(ragged, inputs), wanted)
        for block in blocks_of(ragged):
            block.compile(backend="eager", fullgraph=True)
        assert torch.equal(output(ragged, inputs), wanted)
        with masks_seen(len(blocks_of(ragged))) as seen:
            assert torch.equal(output(ragged, rows(inputs, [1])), alone)
        assert seen == [None] * len(blocks_of(ragged))
        assert torch.equal(output(torch.compile(whole, backend="eager", fullgraph=True), inputs), wanted)
        torch._dynamo.reset()


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
@pytest.mark.parametrize("backend", _ragged.VARLEN)
@pytest.mark.parametrize("name", MASKS)
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
    """diffusers' own varlen backends would read a length in every block, and torch's runs as before."""
    model, inputs = made("hunyuan", (5,), BF16)
    dgf.accelerate(model, "fast")
    for block in blocks_of(model):
        block.attn.processor._attention_backend = backend
    output(model, inputs)
    assert ([] if backend == "native" else [([0, 23], 23)] * 4) == CALLS


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
    else:
        monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3", raising=False)
    assert varlen_place("native", (8, 0), BF16, 128) is None
    assert varlen_place("flash", (8, 0), BF16, 128) == _ragged._FLASH_2


@pytest.mark.parametrize(
    "op", ["torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd"]
)
def test_policies_know_varlen_kernels(op: str) -> None:
    assert group(op) == "attention"
