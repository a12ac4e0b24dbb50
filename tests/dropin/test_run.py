"""`dancegrpo-fast run` is Python: the same facts, the same ends; and its own options."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dancegrpo_fast import backends
from dancegrpo_fast.cli import main
from dancegrpo_fast.cli.run import main as prepare
from dancegrpo_fast.dropin.launchers import launches, with_run
from dancegrpo_fast.dropin.settings import BACKENDS

from ..processes import LIMIT

RUN = ("-m", "dancegrpo_fast.cli", "run")
SAID = "dancegrpo-fast run: "


def python(folder: Path, *words: str, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """Runs this Python in a folder; of a path, what is there comes first."""
    environment = dict(os.environ)
    if path:
        # The package of this repository stays where it was found.
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *inherited])
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=LIMIT)


def write(root: Path, files: Mapping[str, str]) -> None:
    """Files with these texts, and the folders that they need."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def others(text: str) -> str:
    """What is not said by `run`."""
    return "".join(line for line in text.splitlines(True) if not line.startswith(SAID))


FACTS = """
import json, sys

def flux_step(model_output): ...

main = sys.modules["__main__"]
names = ("__name__", "__file__", "__package__", "__cached__", "__doc__")
print(json.dumps({"argv": sys.argv, "first": sys.path[0], "rest": sorted(sys.path[1:]), "globals": sorted(globals()),
                  "is main": main.__dict__ is globals(), "loader": type(__loader__).__name__,
                  "spec": __spec__ and [__spec__.name, __spec__.origin, __spec__.parent],
                  "torch": "torch" in sys.modules, "relative": RELATIVE, **{name: globals()[name] for name in names}}))
sys.exit(7)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script, a package that is a program and has one, a folder and a zip file."""
    root = tmp_path_factory.mktemp("programs")
    plain = FACTS.replace("RELATIVE", "None")
    relative = "from . import side" + FACTS.replace("RELATIVE", "side.__name__")
    files = {
        "train.py": f'"""A script."""{plain}',
        "package/__init__.py": "",
        "package/side.py": "",
        "package/__main__.py": relative,
        # Without __init__.py, as most repositories have it.
        "package/deep/train.py": relative.replace("from .", "from .."),
        "application/__main__.py": plain,
    }
    write(root, files)
    with zipfile.ZipFile(root / "application.zip", "w") as archive:
        archive.writestr("__main__.py", plain)
    (root / "links").mkdir()
    (root / "links" / "train.py").symlink_to(root / "train.py")
    return root


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--rounding", "x"),
        ("./package/../train.py",),
        ("links/train.py",),
        ("-m", "package", "a", "--", "b"),
        ("-m", "package.deep.train"),
        ("application", "a"),
        ("application.zip", "-m", "a"),
    ],
    ids=" ".join,
)
def test_a_program_sees_what_it_sees_under_python(words: Sequence[str], programs: Path) -> None:
    plain, ours = python(programs, *words), python(programs, *RUN, *words)
    assert (plain.returncode, plain.stderr) == (7, "")
    assert (ours.returncode, others(ours.stderr)) == (7, "")
    assert json.loads(ours.stdout) == json.loads(plain.stdout)


@pytest.mark.parametrize("words", [["train.py"], ["-m", "package"], ["application"]], ids=" ".join)
def test_whoever_starts_run_the_program_sees_the_same(words: list[str], programs: Path) -> None:
    # A path that begins otherwise, as under the installed command.
    ours = python(programs, "-c", f"from dancegrpo_fast.cli import main; main(['run', *{words}])")
    assert json.loads(ours.stdout) == json.loads(python(programs, *words).stdout)


def test_a_safe_path_stays_safe(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for words in (("train.py",), ("application",), ("application.zip",), ("-m", "package")):
        paths = [python(programs, *more, *words, path=[programs]) for more in ((), RUN)]
        assert paths[0].stdout and paths[0].stdout == paths[1].stdout, paths[1].stderr


def test_two_dashes_before_a_script_s_arguments_are_left_out(programs: Path) -> None:
    ours = python(programs, *RUN, "train.py", "--", "--", "x")
    assert json.loads(ours.stdout)["argv"] == ["train.py", "--", "x"]


ENDS = {
    "error": "def broken():\n    {}['x']\n\n\nbroken()",
    "error of another": "import other",
    "missing": "import no_such_module",
    "syntax": "x = 1\ndef f(:\n    pass",
    "syntax of another": "import wrong",
    "known and broken": "import known_and_broken",
    "interrupt": "raise KeyboardInterrupt",
    "text": "raise SystemExit('the end')",
    "hook": "import sys\nsys.excepthook = lambda kind, value, trace: print(kind, trace.tb_lineno)\n1 / 0",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('x') from error",
    "warning of another": "import warning",
    "warning": "import warnings\nassert (1, 'x')\nwarnings.warn('seen')\ndef flux_step(): return '\\\\d'",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_program_ends_as_under_python(name: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ENDS[name])
    (tmp_path / "other.py").write_text("def f():\n    raise OSError('of another')\n\n\nf()\n")
    (tmp_path / "wrong.py").write_text("x = (\n")
    (tmp_path / "known_and_broken.py").write_text("@print\ndef flux_step(a):\n    ...\n\n\n1 / 0\n")
    (tmp_path / "warning.py").write_text("def flux_step(): return '\\d'\nassert (1, 'x')\n")
    # Nothing of the first run is left for the second.
    plain, ours = (python(tmp_path, "-B", *command, "train.py") for command in ((), RUN))
    for end in (plain, ours):
        # Of the printed function, as every address.
        end.stdout = end.stdout.partition(" at 0x")[0]
    assert (ours.returncode, ours.stdout, others(ours.stderr)) == (plain.returncode, plain.stdout, plain.stderr)


def test_nothing_known_is_said_after_the_script_has_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "def flux(a): ...\ndef f():\n    def flux_step(a): ...\nclass A:\n    def step(self): ..."
    )
    done = python(tmp_path, *RUN, "--only", "flux_step,__main__:dance_grpo_step", "train.py")
    assert done.returncode == 0 and not done.stdout
    assert done.stderr.splitlines() == [
        f"{SAID}--only flux_step: no such function was defined",
        f"{SAID}--only __main__:dance_grpo_step: no such function was defined",
        f"{SAID}no step function of a known project was defined in this process: nothing was replaced (see --help)",
    ]


def test_help_names_options_and_functions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--latents DTYPE" in told and "FlowMatchSDEDiscreteScheduler.sample_previous_step  (verl-omni)" in told
    assert backends.NAMES == BACKENDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "script: got none, want a Python file, or -m and a module"),
        (["-m"], "script: got none"),
        (["--rounding"], "--rounding: got nothing, want a value"),
        (["missing.py"], "script: got missing.py, which does not exist; want a Python file"),
        (["."], "script: got ., a folder without __main__.py; want a Python file"),
        (["--rounding", "no", "x.py"], '--rounding: got "no", want one of'),
        (["--backend=gpu", "x.py"], '--backend: got "gpu", want one of'),
        (["--latents=float64", "x.py"], '--latents: got "float64", want one of'),
        (["--accelerate", "yes", "x.py"], '--accelerate: got "yes", want one of'),
        (
            ["--only", "flux", "x.py"],
            '--only: got "flux", want NAME or package.module:NAME of\n  flux_step  (DanceGRPO; ',
        ),
        (["--skip", "m:step", "x.py"], '--skip: got "m:step", want NAME'),
        (["--skip=,", "x.py"], '--skip: got ",", want a name'),
        (["--report", "no/run.json", "x.py"], "--report: got no/run.json, whose folder does not exist; want a file"),
        (["--report", ".", "x.py"], "--report: got ., a folder; want a file to write"),
        (["--report=", "x.py"], "--report: got , a folder; want a file to write"),
        (["--other", "x.py"], "--other: want one of --rounding, --backend,"),
        (["-c", "x.py"], "-c: want one of --rounding, --backend,"),
        (
            ["-m", "torch.distributed.run", "--nproc-per-node=2", "train.py", "a"],
            "-m torch.distributed.run: got a launcher, whose processes would not be replaced; want: "
            "python -m torch.distributed.run --nproc-per-node=2 -m dancegrpo_fast.cli run train.py a",
        ),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as raised:
        prepare(arguments)
    assert str(raised.value).startswith(message)
    assert main(["run", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_report_that_could_not_be_written_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (str(path), mode) != (str(tmp_path), os.W_OK))
    with pytest.raises(ValueError, match=r"--report: got .*run.json, in a folder where you may not write; want a file"):
        prepare(["--report", str(tmp_path / "run.json"), "x.py"])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("/venv/bin/torchrun --nproc 2 train.py a.py", "/venv/bin/torchrun --nproc 2 -m {} train.py a.py"),
        ("torchrun --nproc 2 -m a.b c", "torchrun --nproc 2 -m {} -m a.b c"),
        ("accelerate launch --num_processes 2 train.py", "accelerate launch --num_processes 2 -m {} train.py"),
        ("accelerate launch --module a.b", "accelerate launch -m {} -m a.b"),
        ("deepspeed --num_gpus 2 train.py", "deepspeed --num_gpus 2 --module {} train.py"),
        ("-m torch.distributed.run train.py", "-m torch.distributed.run -m {} train.py"),
        ("torchrun train", "torchrun train -m {} SCRIPT.py"),
    ],
)
def test_a_launcher_comes_first(words: str, wanted: str) -> None:
    assert launches(words.split())
    assert with_run(words.split()) == wanted.format("dancegrpo_fast.cli run")


def test_what_is_no_launcher() -> None:
    assert not any(map(launches, ([], ["-m"], ["-m", "train"], ["train.py", "torchrun"])))


def test_nothing_heavy_is_imported_before_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import sys; print({'torch', 'numpy', 'diffusers', 'yaml'} & sys.modules.keys())"
    )
    assert python(tmp_path, *RUN, "--accelerate", "lossless", "train.py").stdout == "set()\n"
