"""Drop-in replacements for the step functions of published training scripts, one module per project.

`from dancegrpo_fast.compat.dancegrpo import flux_step` replaces one by hand, `patched(module)` every one that it
recognises, and `dancegrpo-fast run script.py` those of a script that stays as it is. The last two try the original
and ours side by side, at the first call, on small CPU tensors, and replace only what computes the same.
"""

import pkgutil
from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from ..dropin.patched import Replacement as Replacement
    from ..dropin.patched import patched as patched

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {".dropin.patched": ("Replacement", "patched")},
    (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")),
)
