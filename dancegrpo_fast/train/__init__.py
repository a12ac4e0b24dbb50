"""The loop and its parts."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .loop import Trainer as Trainer

__getattr__, __dir__, __all__ = lazy(__name__, {"loop": ("Trainer",)})
