"""What checkpoint policies keep between forward and backward, in bytes of live storages."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dancegrpo_fast import accelerate
from dancegrpo_fast.activations import offload as offload_module
from dancegrpo_fast.activations.checkpointing import FirstBlocks, apply, blocks_of

from ..patch.models import FAMILIES, assert_same_bits, run
from ..release import release_but
from .policies import MODELS, build, kept
from .streams import side_stream


@pytest.mark.parametrize("dtype", release_but((torch.bfloat16,), [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_policies_keep_less_in_order(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    found = [kept(model, name, policy, dtype) for policy in ("none", "matmul", "attention", "full")]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found), found


@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_no_weights_of_checkpointed_blocks(name: str) -> None:
    model = build(name)
    inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in inside) * torch.bfloat16.itemsize
    cached, uncached = (
        kept(model, name, "full", autocast=torch.autocast("cpu", torch.bfloat16, cache_enabled=cache))
        for cache in (True, False)
    )
    assert 0 < cached - uncached <= outside


@pytest.mark.parametrize("name", release_but(("flux", "unet"), MODELS))
def test_first_blocks_keep_less_one_by_one(name: str) -> None:
    model = build(name)
    count = len(blocks_of(model))
    found = [kept(model, name, FirstBlocks(k)) for k in range(count + 1)]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found), found
    assert found[0] == kept(model, name, "none") and found[-1] == kept(model, name, "full")


@pytest.mark.pairs
@pytest.mark.parametrize("policy", ["full", "attention"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_recompute_hooks_keep_nothing_alive_in_a_checkpoint(name: str, lora: bool, policy: str) -> None:
    found = set()
    for recompute in ("none", "gelu", "all"):
        model = build(name, lora=lora)
        accelerate(model, "fast", recompute=recompute)
        found.add(kept(model, name, policy))
    assert len(found) == 1, found


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_inputs_leave_the_device(name: str) -> None:
    model = build(name)
    seen: list[StorageWeakRef] = []
    for block in blocks_of(model)[1:]:
        block.register_forward_pre_hook(
            lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())) if len(seen) < count else None
        )
    count = len(blocks_of(model)) - 1
    for offload in (False, True):
        seen.clear()
        undo = apply(model, "full", offload=offload)
        output = model(**MODELS[name].inputs(), return_dict=False)[0]
        assert len(seen) == count
        # A UNet's skip connections hold some for other reasons.
        gone = sum(reference.expired() for reference in seen)
        assert (gone > 0) == offload and (gone == count or not offload or name == "unet"), (gone, count)
        output.sum().backward()
        undo()


def test_offload_copies_shared_inputs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    class Counting(offload_module.HostCopy):
        def __init__(self, tensor: Tensor, side: Any) -> None:
            copied.append(tensor.shape)
            super().__init__(tensor, side)

    monkeypatch.setattr(offload_module, "HostCopy", Counting)
    model: Any = build("flux")
    apply(model, "full", offload=True)
    inputs = MODELS["flux"].inputs()
    model(**inputs, return_dict=False)
    batch, width = 2, model.inner_dim
    # The embedding that every block gets.
    assert copied.count(torch.Size([batch, width])) == 1
    # The second single block gets the two parts of one tensor.
    assert copied.count(torch.Size([batch, 7 + 12, width])) == 1
    assert len(copied) == 3 + 2 + 2 + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offload_on_a_gpu() -> None:
    blocks, tokens = 8, 2**14
    model: Any = MODELS["flux"].build(num_layers=blocks, num_single_layers=0).to("cuda", torch.bfloat16)
    inputs = MODELS["flux"].inputs(torch.bfloat16, batch=1)
    inputs["hidden_states"] = torch.randn(1, tokens, 8, dtype=torch.bfloat16)
    inputs["img_ids"] = torch.zeros(tokens, 3, dtype=torch.bfloat16)
    inputs = {key: value.cuda() for key, value in inputs.items()}
    stream = tokens * model.inner_dim * 2
    wanted = run(model, inputs)
    live = []
    for offload in (False, True):
        undo = apply(model, "full", offload=offload)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = model(**inputs, return_dict=False)[0]
        live.append(torch.cuda.memory_allocated() - before)
        del output
        for _ in range(3):
            assert_same_bits(run(model, inputs), wanted)
        undo()
    # What stays may be the last block's input, which is on its way.
    assert live[0] - live[1] >= (blocks - 1) * stream


def test_copies_run_beside_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    side = side_stream(monkeypatch, log)
    empty_strided = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, pin_memory=False, **k: empty_strided(*a, **k))
    monkeypatch.setattr(offload_module.HostInputs, "_side", lambda *_: side)
    model = build("wan")
    inputs = MODELS["wan"].inputs()
    wanted = run(model, inputs)
    first, last = blocks_of(model)
    for name, block in (("first", first), ("last", last)):
        block.register_forward_pre_hook(lambda *_, name=name: log.append(name))
    apply(model, "full", offload=True)
    assert_same_bits(run(model, inputs), wanted)
    starts = [i for i, entry in enumerate(log) if entry in ("first", "last")]
    assert [log[i] for i in starts] == ["first", "last", "last", "first"]
    out_first, out_last, back_last, back_first = (
        [kind for kind, _ in log[a + 1 : b]] for a, b in zip([-1, *starts[:3]], starts, strict=True)
    )
    # Tokens, text and two embeddings of time; only the tokens are new to the last block.
    copies = len(out_first)
    assert out_first == ["copied"] * copies and copies > 1
    # The main stream takes back the memory of what left while the first block ran.
    assert out_last == ["awaited"] * copies + ["copied"]
    # The last block's inputs, then the first one's ahead of their use.
    assert back_last == ["awaited"] + ["copied", "awaited"] * copies + ["copied"] * copies
    assert back_first == ["awaited"] * copies
    events = [event for entry in log if isinstance(entry, tuple) and entry[0] == "awaited" for event in entry[1:]]
    assert sorted(events) == [i for i, entry in enumerate(log) if isinstance(entry, tuple) and entry[0] == "copied"]
