"""The loop and its parts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import Trainer as Trainer

__all__ = ["Trainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".loop", __name__), name)
