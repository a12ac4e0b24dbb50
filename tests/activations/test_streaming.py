"""Block swap changes no bit of results and gradients, whatever is kept or computed again, and loses no weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dancegrpo_fast.activations.checkpointing import apply, blocks_of
from dancegrpo_fast.activations.streaming import ALIGNMENT, BUFFERS, BlockSwap, packed, streamed_blocks

from ..models import parts
from ..patch.models import assert_same_bits, run
from ..release import release_but
from .policies import MODELS, add_lora, mixed
from .streams import side_stream

CPU = torch.device("cpu")
DEEPER = {"wan": {"num_layers": 5}} | {key: {"num_layers": 4} for key in ("qwen", "sd3", "sd3.5")}


def deep(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With LoRA, and blocks enough to swap two of them."""
    torch.manual_seed(0)
    made = MODELS[name]
    model = parts.randomised(made.build(**made.changes | DEEPER.get(name, {}))).to(dtype)
    add_lora(model, dtype)
    return model


def sampled(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Two calls as in a rollout."""
    with torch.no_grad():
        return [model(**inputs, return_dict=False)[0] for _ in range(2)]


@pytest.mark.parametrize("dtype", release_but((torch.bfloat16,), [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("name", release_but(("flux", "unet"), MODELS))
def test_same_bits(name: str, dtype: torch.dtype) -> None:
    inputs = MODELS[name].inputs(dtype)
    model = deep(name, dtype)
    rollout, wanted = sampled(model, inputs), run(model, inputs)
    for count in (1, 2):
        model = deep(name, dtype)
        BlockSwap(model, count, CPU)
        for policy, offload in (("none", False), ("full", False), ("attention", name != "unet"), ("mixed", False)):
            undo = apply(model, mixed(model) if policy == "mixed" else policy, offload=offload)
            assert all(torch.equal(a, b) for a, b in zip(sampled(model, inputs), rollout, strict=True))
            for _ in range(2):
                assert_same_bits(run(model, inputs), wanted)
            undo()


@pytest.mark.parametrize("policy", ["none", "full"])
def test_two_graphs_at_once_and_backward_in_any_order(policy: str) -> None:
    first, second = MODELS["flux"].inputs(), MODELS["flux"].inputs(batch=1)
    model = deep("flux")
    apart = run(model, first)[1], run(model, second)[1]
    wanted = {name: None if g is None else g + apart[1][name] for name, g in apart[0].items()}
    BlockSwap(model, 2, CPU)
    apply(model, policy)
    model.zero_grad()
    losses = [model(**inputs, return_dict=False)[0].double().square().mean() for inputs in (first, second)]
    sampled(model, first)
    for loss in losses:
        loss.backward()
    found = dict(model.named_parameters())
    assert all(
        found[name].grad is None if g is None else torch.equal(found[name].grad, g) for name, g in wanted.items()
    )


def test_blocks_are_spread_and_each_has_its_buffer() -> None:
    assert streamed_blocks(57, 1) == [9, 28, 47]
    for blocks in (3, 4, 57, 60):
        for count in range(1, blocks - BUFFERS + 1):
            found = streamed_blocks(blocks, count)
            assert found == sorted(set(found)) and len(found) == count + BUFFERS and 0 <= found[0] <= found[-1] < blocks
    assert packed([1, ALIGNMENT, ALIGNMENT + 1, 0]) == ([0, ALIGNMENT, 2 * ALIGNMENT, 4 * ALIGNMENT], 4 * ALIGNMENT)


@pytest.mark.parametrize("count", [1, 2])
def test_the_device_holds_as_many_blocks_less(count: int) -> None:
    model = deep("wan")
    each = sum(p.nbytes for p in blocks_of(model)[0].parameters() if not p.requires_grad)
    before = storages(model)
    BlockSwap(model, count, CPU)
    padding = BUFFERS * ALIGNMENT * sum(1 for _ in blocks_of(model)[0].parameters())
    assert abs(before - storages(model) - count * each) <= padding


def storages(model: nn.Module) -> int:
    """Bytes that parameters lie in."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def test_state_dicts_are_whole_and_can_be_loaded() -> None:
    model, inputs = deep("flux"), MODELS["flux"].inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    swap = BlockSwap(model, 2, CPU)
    sampled(model, inputs)
    found = model.state_dict()
    assert found.keys() == before.keys() and all(torch.equal(found[name], value) for name, value in before.items())
    doubled = {name: 2 * value for name, value in before.items()}
    plain = deep("flux")
    plain.load_state_dict(doubled)
    wanted = sampled(plain, inputs)
    model.load_state_dict(doubled)
    assert torch.equal(sampled(model, inputs)[0], wanted[0])
    # By way of the tensors of a state dict, too.
    for name, value in model.state_dict().items():
        value.copy_(before[name])
    assert not torch.equal(sampled(model, inputs)[0], wanted[0])
    # On the host there are no buffers.
    again = sampled(model, inputs)
    swap._leave()
    assert torch.equal(sampled(model, inputs)[0], again[0])
    swap._enter(CPU)
    assert torch.equal(sampled(model, inputs)[0], again[0])


def test_copies_run_beside_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    side = side_stream(monkeypatch, log)
    model, inputs = deep("wan"), MODELS["wan"].inputs()
    blocks = blocks_of(model)
    wanted = run(model, inputs)
    swap: Any = BlockSwap(model, 2, CPU)
    assert [streamed.block for streamed in swap.streamed] == [blocks[i] for i in (0, 1, 3, 4)]
    swap._side = side
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: log.append(i))
    apply(model, "full")
    assert_same_bits(run(model, inputs), wanted)
    forward = ["copy", "wait", "copy", 0, "wait", "copy", 1, 2, "wait", "copy", 3, "wait", 4]
    # What ran last is there; the last block's buffer is free for the third once its backward is over.
    backward = [4, "copy", 3, 2, "wait", "copy", 1, "wait", 0]
    assert kinds(log) == forward + backward
    del log[:]
    # The first two are there from the backward; the first comes again for the next call.
    sampled(model, inputs)
    one = [0, "copy", 1, 2, "wait", "copy", 3, "wait", 4, "copy"]
    assert kinds(log) == [*one, "wait", "copy", 0, "wait", "copy", 1, 2, "wait", "copy", 3, "wait", 4, "copy"]


def kinds(log: list[Any]) -> list[Any]:
    """Blocks by number, and copies and waits without their events."""
    return [{"copied": "copy", "awaited": "wait"}[entry[0]] if isinstance(entry, tuple) else entry for entry in log]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockSwap(deep("flux"), 3, CPU), "blocks_to_swap: got 3, want 1 to 2, 2 less than there are"),
        (lambda: BlockSwap(deep("flux"), 0, CPU), "blocks_to_swap: got 0, want 1 to 2"),
        (lambda: BlockSwap(deep("flux"), True, CPU), "blocks_to_swap: got True, want 1 to 2"),
        (
            lambda: BlockSwap(MODELS["flux"].model(), 1, CPU),
            "blocks_to_swap: got 1 with all weights trained, want LoRA",
        ),
        (lambda: BlockSwap(compiled(), 1, CPU), "blocks_to_swap: got 1 with compiled blocks, want plain ones"),
        (lambda: moved(torch.bfloat16), "blocks_to_swap: got another dtype for .*float32.* that stream"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def compiled() -> nn.Module:
    model = deep("flux")
    for block in blocks_of(model):
        block.compile()
    return model


def moved(dtype: torch.dtype) -> None:
    model = deep("flux")
    BlockSwap(model, 1, CPU)
    model.to(dtype)
