"""Processes that tests start: none makes a test wait for ever, and none outlives it."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

# Seconds, less than a test may take, so that a test which waited says for what.
LIMIT = 600
# What every run imports, imported once: processes are forked from one that has it.
IMPORTED = [
    "accelerate",
    "dancegrpo_fast.cli.train",
    "dancegrpo_fast.train.loop",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers",
    "jsonargparse",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
]
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(IMPORTED)


def forked(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """Starts a function in a process that has imported what every run does, of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        # Or the folder that the tests start in would come first.
        patch.setenv("PYTHONSAFEPATH", "1")
        forkserver.ensure_running()
    process = _FORKED.Process(target=target, args=arguments)
    process.start()
    return process


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


class _Forked:
    """A script in such a process, with the names that `subprocess` has."""

    def __init__(self, command: Sequence[str], stdout: Path, stderr: Path) -> None:
        self._process = forked(_script, command, str(stdout), str(stderr))

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _script(command: Sequence[str], stdout: str, stderr: str) -> None:
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


def together(
    commands: Sequence[Sequence[str]],
    folder: Path,
    environments: Sequence[Mapping[str, str]] | None = None,
    *,
    scripts: bool = False,
) -> list[str]:
    """Runs commands at the same time, to their ends; returns what each printed.

    Where one fails or time is up the others are ended, which may wait for it.

    Args:
        commands: each with exit status 0.
        folder: of files with what they print: a full pipe would stop a process that another one waits for.
        environments: one for each; None: this process's.
        scripts: the commands are scripts, which are forked from a process that has imported what a run does.

    Raises:
        AssertionError: one failed, or ran out of time; with the end of what each printed.
    """
    assert not (scripts and environments), "scripts have the environment of the process that they are forked from"
    files = [(folder / f"stdout.{number}", folder / f"stderr.{number}") for number in range(len(commands))]
    with ExitStack() as stack:
        workers: list[Any] = []
        for number, command in enumerate(commands):
            if scripts:
                workers.append(_Forked(command, *files[number]))
                continue
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
