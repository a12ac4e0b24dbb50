"""Where the repository is, where results go, and which commit is measured; it loads nothing that is measured."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def slug(name: str) -> str:
    """A device's name in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def commit() -> str:
    """The commit, where there is a repository; "-dirty" behind it for changes, but those of results."""
    # The gate knows it where its copy of the tree has no repository.
    if known := os.environ.get("BENCH_COMMIT"):
        return known

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "no repository"
