"""diffusers keeps the attention backend of the last model that was told one for all models."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    registry = dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry._active_backend = before
