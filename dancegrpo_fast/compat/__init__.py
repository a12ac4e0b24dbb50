"""Drop-in replacements for the step functions of published training scripts, one module per project.

`from dancegrpo_fast.compat.dancegrpo import flux_step` replaces one by hand, `patched(module)` every one that it
recognises, and `dancegrpo-fast run script.py` those of a script that stays as it is.
"""

from ._patch import Replacement as Replacement
from ._patch import patched as patched

__all__ = ["Replacement", "patched"]
