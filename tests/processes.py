"""Processes that tests start: none makes a test wait for ever, and none outlives it."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

# Seconds, less than a test may take, so that a test which waited says for what.
LIMIT = 600


def pytest_elsewhere(config: pytest.Config, files: Sequence[str], **environment: str) -> None:
    """Runs tests in a process with another environment, those that this one is told to choose; none may be skipped."""
    # -P: the installed package, not the folder that the tests start in.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", config.option.markexpr]
    run = subprocess.run(
        [*command, "-W", "ignore::RuntimeWarning", *files],
        env=os.environ | environment,
        cwd=config.rootpath,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout and "skipped" not in run.stdout, run.stdout


def together(
    commands: Sequence[Sequence[str]], folder: Path, environments: Sequence[Mapping[str, str]] | None = None
) -> list[str]:
    """Runs commands at the same time, to their ends; returns what each printed.

    Where one fails or time is up the others are ended, which may wait for it.

    Args:
        commands: each with exit status 0.
        folder: of files with what they print: a full pipe would stop a process that another one waits for.
        environments: one for each; None: this process's.

    Raises:
        AssertionError: one failed, or ran out of time; with the end of what each printed.
    """
    files = [(folder / f"stdout.{number}", folder / f"stderr.{number}") for number in range(len(commands))]
    with ExitStack() as stack:
        workers = []
        for number, command in enumerate(commands):
            out, err = (stack.enter_context(file.open("w")) for file in files[number])
            environment = None if environments is None else environments[number]
            workers.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
        end, codes = time.monotonic() + LIMIT, [None]
        try:
            while None in codes and not any(codes) and time.monotonic() < end:
                time.sleep(0.02)
                codes = [worker.poll() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert codes == [0] * len(commands), (codes, [[file.read_text()[-3000:] for file in pair] for pair in files])
    return [printed.read_text() for printed, _ in files]
