"""What CUDA's allocator is told."""

import sys

import pytest
import torch

from dancegrpo_fast import allocator

GPU = torch.device("cuda:0")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be told to the allocator."""
    found: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    for name in allocator.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return found


def test_segments_expand_unless_told_otherwise(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.expand_segments(GPU).startswith("allocator: expandable segments") and allocator.expands(GPU)
    assert told == ["expandable_segments:True"]
    for value, expands in (("expandable_segments:False", False), ("max_split_size_mb:128", False)):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", value)
        assert allocator.expand_segments(GPU) == f"allocator: as PYTORCH_CUDA_ALLOC_CONF={value} says"
        assert allocator.expands(GPU) is expands
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert allocator.expands(GPU) and len(told) == 1


def test_where_they_cannot(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert allocator.expand_segments(GPU) == "allocator: segments cannot expand here" and not allocator.expands(GPU)
    assert allocator.expand_segments(torch.device("cpu")) == "" and not told
