"""Tiny models of every architecture with LoRA and patched blocks, policies for them, and what they keep."""

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dancegrpo_fast import accelerate
from dancegrpo_fast.activations.checkpointing import KEEPABLE, FirstBlocks, Keep, PerBlock, apply, blocks_of

from ..models import parts
from ..patch.models import FAMILIES, TINY, Tiny


def _unet_inputs(dtype: torch.dtype, batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(batch, 5, 12, dtype=dtype),
    }


MODELS = {name: TINY[name] for name in FAMILIES} | {"unet": Tiny(functools.partial(parts.unet, 12), _unet_inputs)}
POLICIES = {
    "full": "full",
    "attention": "attention",
    "matmul": "matmul",
    "all groups": Keep(KEEPABLE),
    "first": FirstBlocks(1),
    "mixed": None,
}
PATCHES = {"unpatched": None, "lossless all": ("lossless", "all"), "fast gelu": ("fast", "gelu")}


def build(name: str, dtype: torch.dtype = torch.float32, lora: bool = False, patch: str = "unpatched") -> nn.Module:
    model = MODELS[name].model(dtype)
    if lora:
        add_lora(model, dtype)
    if (settings := PATCHES[patch]) is not None:
        accelerate(model, settings[0], recompute=settings[1])
    return model


def add_lora(model: Any, dtype: torch.dtype, dropout: float = 0.0) -> None:
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "net.2"]
    # Gaussian and not 0, so that both of its matrices have a gradient.
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False))
    model.to(dtype)


def mixed(model: nn.Module) -> PerBlock:
    cycle = ("none", "attention", Keep({"norm", "rope"}), "full", None)
    return PerBlock(tuple(cycle[i % len(cycle)] for i in range(len(blocks_of(model)))))


class _Live(TorchDispatchMode):
    """Every storage that operations write inside."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def kept(
    model: nn.Module, name: str, policy: Any, dtype: torch.dtype = torch.float32, autocast: Any = None, **options: Any
) -> int:
    """Bytes that live between forward and backward because of the forward, its output included."""
    inputs = MODELS[name].inputs(dtype)
    with torch.no_grad():
        # Tables that the model makes once are not the policy's.
        model(**inputs, return_dict=False)
    undo = apply(model, policy, **options)
    try:
        live = _Live()
        with autocast or contextlib.nullcontext(), live:
            output = model(**inputs, return_dict=False)[0]
            assert output.requires_grad
            return live.bytes()
    finally:
        undo()
