"""Drop-in replacements for the step functions of published training scripts, one module per project.

`from dancegrpo_fast.compat.dancegrpo import flux_step` replaces one by hand, `patched(module)` every one that it
recognises, and `dancegrpo-fast run script.py` those of a script that stays as it is. The last two try the original
and ours side by side, at the first call, on small CPU tensors, and replace only what computes the same.
"""

import importlib
import pkgutil
from typing import Any

from ..dropin.patched import Replacement as Replacement
from ..dropin.patched import patched as patched

__all__ = ["Replacement", "patched"]


def __getattr__(name: str) -> Any:
    """A project's module, `compat.dancegrpo`, imported on first use."""
    if name not in _modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted([*__all__, *_modules()])


def _modules() -> list[str]:
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if not name.startswith("_")]
