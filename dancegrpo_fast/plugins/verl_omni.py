"""verl-omni on our ops: the module for `external_lib`, which does its work when it is imported.

    actor_rollout_ref.model.external_lib=dancegrpo_fast.plugins.verl_omni
    actor_rollout_ref.rollout.external_lib=dancegrpo_fast.plugins.verl_omni

`verl_omni_parts` has the parts for a module of one's own.
"""

from typing import Any

from . import verl_omni_parts as _parts

__getattr__: Any = _parts.pipeline

_parts.step()
_parts.loss()
_parts.blocks()
