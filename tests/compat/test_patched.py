"""Replacing functions in imported modules, and in scripts that stay as they are."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.cli import main
from dancegrpo_fast.compat import Replacement, patched
from dancegrpo_fast.compat.runner import prepare

from ..processes import LIMIT
from ..tolerances import assert_within_budget
from .cases import CASES, F32, PEERS, SIGMAS, draw

FOLDER = Path(__file__).parent


@pytest.fixture
def holder() -> Iterator[ModuleType]:
    """A module that did `from m import f` before."""
    module = ModuleType("holder")
    module.step, module.other = PEERS["mixgrpo"].flow_grpo_step, len
    sys.modules["holder"] = module
    yield module
    del sys.modules["holder"]


def test_functions_are_replaced_wherever_they_were_imported_to(holder: ModuleType) -> None:
    peer = PEERS["mixgrpo"]
    original = peer.flow_grpo_step
    with patched(peer, rounding="reference", backend="reference") as done:
        assert Replacement(peer.__name__, "flow_grpo_step", "dancegrpo_fast.compat.mixgrpo.flow_grpo_step") in done
        assert Replacement("holder", "step", "dancegrpo_fast.compat.mixgrpo.flow_grpo_step") in done
        assert {r.function for r in done} == {"flow_grpo_step", "dance_grpo_step", "step"}
        assert holder.step is peer.flow_grpo_step is not original and holder.other is len
        found = holder.step(draw(F32, 1), draw(F32, 2), 0.7, SIGMAS, 1, draw(F32, 3))
        assert not found[0].requires_grad and found[2].shape == (8,)
    assert holder.step is peer.flow_grpo_step is original


def test_methods_are_replaced_on_their_class_and_put_back_after_an_exception() -> None:
    case, modules = CASES["verl_omni dance"], [PEERS["verl_omni"], PEERS["flow_factory"], PEERS["ddpo"]]
    scheduler = PEERS["verl_omni"].FlowMatchSDEDiscreteScheduler
    original = scheduler.sample_previous_step
    with pytest.raises(KeyError), patched(modules) as done:
        assert len(done) == 3
        v, x, after = draw(F32, 1), draw(F32, 2), draw(F32, 3)
        assert torch.equal(case.peer(v, x, after)["log_prob"], case.ours(v, x, after)["log_prob"])
        raise KeyError
    assert scheduler.sample_previous_step is original


def test_nothing_to_replace_and_unknown_signatures_are_refused() -> None:
    wanted = r"os with none of(.|\n)*flux_step\(model_output, latents, eta, .*sde_solver\)"
    with pytest.raises(ValueError, match=wanted), patched(os):
        pass
    fork = ModuleType("fork")
    exec("def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None): ...", vars(fork))
    wanted = r"got flow_grpo_step\(.*generator=None\), want .*determistic=False\) or .*return_stats=False\)"
    with pytest.raises(ValueError, match=wanted), patched(fork):
        pass


# What a script does with its step: a rollout, and a replay of its second step with one update.
DRIVER = """

def main():
    import sys, torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sigmas = torch.linspace(1, 0, 5)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    model = torch.nn.Linear(6, 6)
    x = torch.randn(8, 5, 6)
    trajectory, log_probs = [x], []
    with torch.no_grad():
        for i in range(4):
            x, log_prob = STEP(model(x), x, sigmas, i, None)
            trajectory.append(x)
            log_probs.append(log_prob)
    for index in torch.randperm(4)[:2]:
        replay = STEP(model(trajectory[index]), trajectory[index], sigmas, index, trajectory[index + 1])[1]
        ratio = torch.exp(replay - log_probs[index])
        (ratio * torch.linspace(-1, 1, 8)).mean().backward()
    torch.save({"trajectory": torch.stack(trajectory), "ratio": ratio.detach(), "grad": model.weight.grad,
                "state": torch.get_rng_state(), "sigmas": sigmas, "model": model.state_dict(),
                "file": __file__, "path": sys.path[0], "argv": sys.argv[2:]}, sys.argv[1])
    sys.exit(7)


if __name__ == "__main__":
    main()
"""
SCRIPTS = {
    "defined in the script": (
        (FOLDER / "peers" / "dancegrpo.py").read_text(),
        "(lambda v, x, s, i, after: flux_step(v, x, 0.3, s, i, after, True, True)[::2])",
    ),
    "from an import": (
        "from steps.mix import flow_grpo_step",
        "(lambda v, x, s, i, after: flow_grpo_step(v, x, 0.7, s, i, after)[:3:2])",
    ),
    "a method of an import": (
        "import torch, steps.schedulers as schedulers\nS = schedulers.FlowMatchSDEDiscreteScheduler(shift=3.0)\n"
        "S.set_timesteps(4)",
        "(lambda v, x, s, i, after: S.sample_previous_step(x, v, S.timesteps[i][None], prev_sample=after)[:2])",
    ),
}


def write(folder: Path, name: str) -> Path:
    head, step = SCRIPTS[name]
    package = folder / "steps"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mix.py").write_text((FOLDER / "peers" / "mixgrpo.py").read_text())
    (package / "schedulers.py").write_text((FOLDER / "peers" / "verl_omni.py").read_text())
    (folder / "train.py").write_text(head + DRIVER.replace("STEP", step))
    return folder / "train.py"


def run_plainly(script: Path, out: Path) -> dict[str, Tensor]:
    """What `python script out --flag x` gives, without a process that imports torch again."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [str(script), str(out), "--flag", "x"])
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    for name in [name for name in sys.modules if name.partition(".")[0] == "steps"]:
        del sys.modules[name]
    assert stop.value.code == 7
    return torch.load(out)


RUN = ("-m", "dancegrpo_fast.cli", "run")


def launch(script: Path, out: Path, *options: str) -> tuple[dict[str, Tensor], str]:
    command = [sys.executable, *RUN, *options, str(script), "--", str(out), "--flag", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, timeout=LIMIT)
    assert done.returncode == 7, done.stderr
    return torch.load(out), done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_it_is(name: str, tmp_path: Path) -> None:
    script = write(tmp_path, name)
    before = run_plainly(script, tmp_path / "before.pt")
    after, told = launch(script, tmp_path / "after.pt", "--rounding", "reference")
    assert "dancegrpo-fast run: " in told and " -> dancegrpo_fast.compat." in told
    for key in ("file", "path", "argv"):
        assert before[key] == after[key]
    assert torch.equal(before["state"], after["state"])
    assert torch.equal(after["ratio"], torch.ones(8)) and bool(after["grad"].any())
    if name != "defined in the script":
        assert torch.equal(before["trajectory"], after["trajectory"])
        return
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 6)
    x = torch.randn(8, 5, 6)
    v = model(x).detach()
    noise = torch.randn(x.shape)
    mean = PEERS["dancegrpo"].flux_step(v.double(), x.double(), 0.3, before["sigmas"].double(), 0, None, False, True)[0]
    tau = 0.3 * (before["sigmas"][0] - before["sigmas"][1]).double().sqrt()
    assert_within_budget(after["trajectory"][1], mean + tau * noise.double(), before["trajectory"][1])
    assert not (tmp_path / "__pycache__").exists()


def test_it_runs_under_torchrun(tmp_path: Path) -> None:
    script = write(tmp_path, "from an import")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *RUN)
    out = tmp_path / "out.pt"
    done = subprocess.run(
        [sys.executable, *command, str(script), "--", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=LIMIT,
    )
    assert "exitcode  : 7" in done.stderr and torch.equal(torch.load(out)["ratio"], torch.ones(8)), done.stderr


def test_a_traceback_shows_the_script_s_lines(tmp_path: Path) -> None:
    text = (FOLDER / "peers" / "dancegrpo.py").read_text() + "\n\ndef broken():\n    flux_step(1, 2)\n\n\nbroken()\n"
    script = tmp_path / "train.py"
    script.write_text(text)
    done = subprocess.run([sys.executable, *RUN, str(script)], capture_output=True, text=True, timeout=LIMIT)
    line = text[: text.index("    flux_step(1, 2)")].count("\n") + 1
    assert done.returncode == 1 and f'File "{script}", line {line}, in broken' in done.stderr
    assert f"{script}:{text[: text.index('def flux_step')].count(chr(10)) + 1} flux_step -> " in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os", r"train.py: neither it nor what it imports defines(.|\n)*flux_step\(model_output.*sde_solver\)"),
        ("def flux_step(a, b=1, *c): ...", r"train.py:1: got flux_step\(a, b=1, c\), want flux_step\(model_output"),
        ("from . import x\nimport no.such.module\ndef f(:", "train.py: .*invalid syntax"),
        ("def f():\n    def flux_step(a): ...\nclass A:\n    def step(self): ...", "neither it nor what it imports"),
    ],
)
def test_nothing_runs_where_nothing_is_replaced(text: str, message: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"{text}\n")
    with pytest.raises(ValueError, match=message):
        prepare([str(script)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "script: got none"),
        (["missing.py"], "script: got missing.py, which does not exist"),
        (["--rounding", "no", "x.py"], '--rounding: got "no", want one of'),
        (["--backend=gpu", "x.py"], '--backend: got "gpu", want one of'),
        (["--other", "x.py"], "--other: want --rounding or --backend"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(arguments)
    assert main(["run", *arguments]) != 0
    assert (message if arguments else "usage") in capsys.readouterr().err
