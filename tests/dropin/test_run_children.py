"""Processes that a script starts under `run`: replaced too, or said not to be."""

import sys
from pathlib import Path

import pytest

import dancegrpo_fast
from dancegrpo_fast.dropin.children import _better, _hint

from .test_run import RUN, SAID, python, write
from .test_run_imports import STEP

# Each worker says whether its own definition, an imported one and one that was handed to it are replaced.
WORKERS = (
    "import concurrent.futures, multiprocessing, sys\nfrom steps.deep.flux import flux_step as imported\n"
    + STEP
    + """

def told(kind, given):
    found = [hasattr(f, "__wrapped__") for f in (flux_step, imported, given)]
    assert "torch" not in sys.modules and given is flux_step
    print(kind, __name__, found, sys.modules["dancegrpo_fast"].__file__, flush=True)


def nested(kind, given):
    told(kind, given)
    child = multiprocessing.get_context("spawn").Process(target=told, args=("nested", given))
    child.start()
    child.join()


if __name__ == "__main__":
    import os
    os.chdir("/")
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            # Before the hook can be there.
            context.set_forkserver_preload(["__main__", "early", "steps.deep.flux"])
        child = context.Process(target=nested if method == "spawn" else told, args=(method, flux_step))
        child.start()
        child.join()
        assert child.exitcode == 0
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(told, "pool", flux_step).result()
"""
)


EARLY = """
from multiprocessing import process, spawn

process.current_process()._inheriting = True
try:
    spawn.import_main_path({path!r})
finally:
    del process.current_process()._inheriting
"""


def test_multiprocessing_s_children_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, {"steps/deep/flux.py": STEP, "train.py": WORKERS, "package/train.py": WORKERS})
    # What the fork server of later Pythons does by itself.
    (tmp_path / "early.py").write_text(EARLY.format(path=str(tmp_path / "train.py")))
    (ours := tmp_path / "elsewhere/dancegrpo_fast").parent.mkdir()
    ours.symlink_to(Path(dancegrpo_fast.__file__).parent)
    for words in (["train.py"], ["-m", "package.train"]):
        # By a path that no child has.
        start = f"import sys; sys.path.insert(1, {str(ours.parent)!r})\nfrom dancegrpo_fast.cli import main\n"
        done = python(tmp_path, "-c", f"{start}main(['run', *{words}])", path=[tmp_path])
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"{kind} {'__main__' if kind == 'fork' else '__mp_main__'} [True, True, True] {ours / '__init__.py'}"
            for kind in ("fork", "spawn", "nested", "forkserver", "pool")
        ]
        # Of the first process only.
        assert done.stderr == f"{SAID}none of these functions was called in this process: flux_step\n"


OTHERS = """
import os, subprocess, sys

subprocess.run([sys.executable, "-c", "pass"], check=True)
for _ in range(2):
    subprocess.run([sys.executable, "-u", "evaluate.py", "--name", "a b"], check=True)
os.system(f"{sys.executable} evaluate.py")
os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "evaluate.py", "forked"])
subprocess.run([b"true"], check=True)
sys.stdout.flush()
os.execv(sys.executable, [sys.executable, "evaluate.py", "replaced"])
"""


def test_other_python_processes_are_named_with_the_words_that_would_do_it(tmp_path: Path) -> None:
    (tmp_path / "evaluate.py").write_text("import sys; print(sys.argv)")
    (tmp_path / "train.py").write_text(OTHERS)
    done = python(tmp_path, *RUN, "train.py")
    assert done.returncode == 0, done.stderr
    arguments = (["--name", "a b"], ["--name", "a b"], [], ["forked"], ["replaced"])
    assert done.stdout.splitlines() == [str(["evaluate.py", *own]) for own in arguments]
    run = f"{' '.join(RUN)} evaluate.py"
    wanted = [f"-u {run} --name 'a b'", run, f"{run} forked", f"{run} replaced"]
    hint = f"{SAID}a Python process is started in which nothing is replaced; to have it replaced: {sys.executable} "
    assert done.stderr.splitlines() == [hint + line for line in wanted]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("python train.py a", "python -m dancegrpo_fast.cli run train.py a"),
        ("/usr/bin/python3.11 -X dev -u train.py", "/usr/bin/python3.11 -X dev -u -m dancegrpo_fast.cli run train.py"),
        ("python -m tests.compat x", "python -m dancegrpo_fast.cli run -m tests.compat x"),
        ("torchrun --nproc 2 train.py", "torchrun --nproc 2 -m dancegrpo_fast.cli run train.py"),
        (
            "python -u -m torch.distributed.run train.py",
            "python -u -m torch.distributed.run -m dancegrpo_fast.cli run train.py",
        ),
        ("python /venv/bin/torchrun train.py", "python /venv/bin/torchrun -m dancegrpo_fast.cli run train.py"),
        ("python", None),
        ("python -c pass", None),
        ("python -", None),
        ("python -m pip install x", None),
        ("python -m json.tool x", None),
        ("python /venv/lib/python3.11/site-packages/torch/worker.py", None),
        ("python -m dancegrpo_fast.cli run train.py", None),
        ("python /venv/bin/dancegrpo-fast run train.py", None),
        ("torchrun -m dancegrpo_fast.cli run train.py", None),
        ("git status", None),
        ("", None),
    ],
)
def test_which_command_lines_would_be_better(words: str, wanted: str | None) -> None:
    assert _better(words.split()) == wanted


def test_ray_is_named() -> None:
    told = _hint(["/venv/site-packages/ray/core/src/ray/raylet/raylet", "--port", "1"])
    assert told is not None and told.startswith("Ray's workers are processes in which nothing is replaced")


def test_a_child_s_report_has_a_file_of_its_own(tmp_path: Path) -> None:
    text = "print(multiprocessing.spawn.get_preparation_data('Worker-1')['dancegrpo_fast']._settings.report)"
    (tmp_path / "train.py").write_text(f"import multiprocessing.spawn\n{text}")
    done = python(tmp_path, *RUN, "--report", "run.json", "train.py")
    assert done.stdout == f"{tmp_path / 'run.Worker-1.json'}\n" and (tmp_path / "run.json").is_file()
