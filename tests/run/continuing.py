"""What tests of continued runs share."""

import json
from pathlib import Path
from typing import Any

from dancegrpo_fast.recipe import Recipe
from dancegrpo_fast.run import checkpoint

from ..train.tiny import make_recipe


def longer(base: Path, run: Path, **changes: Any) -> Recipe:
    """The finished run's recipe with an iteration more."""
    return make_recipe(base, run, **{"iterations": 3, "keep_checkpoints": 3} | changes)


def rewrite(state: Path, **changes: Any) -> None:
    """Another `state.json`, as it would have been written."""
    document = json.loads(state.read_text()) | changes
    del document["digest"]
    state.write_text(json.dumps(document | {"digest": checkpoint.digest(document)}))
