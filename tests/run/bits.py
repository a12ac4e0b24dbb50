"""What two runs have in common when one is the other, interrupted."""

import json
from pathlib import Path
from typing import Any

from dancegrpo_fast.run import checkpoint


def rows(path: Path) -> list[dict[str, Any]]:
    """Of a `.jsonl` file that may not be there yet, without what the clock says."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "speed")} for line in lines]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Rows, samples, weights and the last checkpoint, bit for bit."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(ours / name) == rows(theirs / name)
    last = checkpoint.complete(theirs / "checkpoints")[-1].name
    for folder in ("samples", "model", "model_ema", f"checkpoints/{last}"):
        files = {path.relative_to(theirs) for path in (theirs / folder).rglob("*") if path.is_file()}
        assert files == {path.relative_to(ours) for path in (ours / folder).rglob("*") if path.is_file()}
        for file in files:
            # The state has the folder's own name in it.
            assert file.name == "state.json" or (ours / file).read_bytes() == (theirs / file).read_bytes(), file
