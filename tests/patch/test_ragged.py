"""Prompts of unequal length in one batch, without a mask: values, bits, and what is read and kept."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dancegrpo_fast as dgf
from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.activations.checkpointing import blocks_of
from dancegrpo_fast.patch import _ragged
from dancegrpo_fast.patch._ragged import Lengths, Ragged, packed

from ..ops.block_cases import held
from ..tolerances import assert_within_budget
from .models import TINY, Inputs, assert_gradients_within_budget, assert_same_bits, doubled, run
from .ragged import F32, LENGTHS, MASKS, made, mask_of, masks_seen, output, rows

BF16 = torch.bfloat16
CASES = ("hunyuan", "hunyuan token replace", "skyreels", "qwen", "qwen two conditions")


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

    @pytest.mark.release
    @pytest.mark.parametrize("name", MASKS)
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


def test_lengths_read_in_inference_mode_serve_training() -> None:
    """A rollout in inference mode and its replay share a mask."""
    model, lengths = torch.nn.Module(), []
    model.transformer_blocks = [SimpleNamespace(attn=SimpleNamespace(processor=None), _compiled_call_impl=None)]
    for first in (True, False):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        read = Lengths(text_first=False, leading=True)
        with torch.inference_mode(first):
            lengths.append(read(model, mask, 4))
        lengths.append(read(model, mask, 4))
    with torch.inference_mode():
        inside = torch.tensor([[1, 1, 0], [1, 0, 0]])
        lengths.append(Lengths(text_first=False, leading=True)(model, inside, 4))
    for found in lengths:
        assert found is not None and found.attention is not None
        assert found.attention.lengths == (6, 5) and not found.attention.offsets.is_inference()
