"""Scripts that sample and score under `run`, with torch: in one process, in spawned ones, under torchrun."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..compat.cases import PEERS
from ..tolerances import assert_within_budget
from .test_run import RUN, SAID, python, write

FOLDER = Path(__file__).parents[1] / "compat"
# A rollout and a replay of two steps with every kind of definition: in the script, imported, a method of an import.
SCRIPT = (
    (FOLDER / "peers" / "dancegrpo.py").read_text()
    + """
import steps.schedulers
from steps.mix import flow_grpo_step


def ways():
    scheduler = steps.schedulers.FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    times = scheduler.timesteps
    return {
        "script": lambda v, x, s, i, after: flux_step(v, x, 0.3, s, i, after, True, True)[::2],
        "import": lambda v, x, s, i, after: flow_grpo_step(v, x, 0.7, s, i, after)[:3:2],
        "method": lambda v, x, s, i, after: scheduler.sample_previous_step(x, v, times[i][None], prev_sample=after)[:2],
    }


def drive(step):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sigmas = torch.linspace(1, 0, 5)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    model = torch.nn.Linear(6, 6)
    x = torch.randn(8, 5, 6)
    trajectory, log_probs = [x], []
    with torch.no_grad():
        for i in range(4):
            x, log_prob = step(model(x), x, sigmas, i, None)
            trajectory.append(x)
            log_probs.append(log_prob)
    for index in torch.randperm(4)[:2]:
        replay = step(model(trajectory[index]), trajectory[index], sigmas, index, trajectory[index + 1])[1]
        ratio = torch.exp(replay - log_probs[index])
        (ratio * torch.linspace(-1, 1, 8)).mean().backward()
    return {"trajectory": torch.stack(trajectory), "ratio": ratio.detach(), "grad": model.weight.grad,
            "state": torch.get_rng_state(), "sigmas": sigmas}


def worker(rank, out):
    torch.save({"script": drive(ways()["script"])}, f"{out}.{rank}")


if __name__ == "__main__":
    import sys
    torch.save({name: drive(step) for name, step in ways().items()}, sys.argv[1])
    if "--spawn" in sys.argv:
        child = torch.multiprocessing.get_context("forkserver").Process(target=worker, args=(1, sys.argv[1]))
        child.start()
        torch.multiprocessing.spawn(worker, args=(sys.argv[1],))
        child.join()
    sys.exit(7)
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scripts")
    mix, schedulers = ((FOLDER / "peers" / name).read_text() for name in ("mixgrpo.py", "verl_omni.py"))
    write(root, {"steps/mix.py": mix, "steps/schedulers.py": schedulers, "train.py": SCRIPT})
    return root


def run_plainly(script: Path, out: Path) -> dict[str, Any]:
    """What `python script out` gives, without a process that imports torch again."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [str(script), str(out)])
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    for name in [name for name in sys.modules if name.partition(".")[0] == "steps"]:
        del sys.modules[name]
    assert stop.value.code == 7
    return torch.load(out)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    plain = run_plainly(folder / "train.py", folder / "plain.pt")
    out = folder / "ours.pt"
    done = python(folder, *RUN, "--rounding", "reference", "train.py", str(out), "--spawn")
    assert done.returncode == 7, done.stderr
    children = [torch.load(f"{out}.{rank}")["script"] for rank in range(2)]
    return {"plain": plain, "ours": torch.load(out), "children": children, "said": done.stderr}


@pytest.mark.parametrize("name", ["script", "import", "method"])
def test_each_step_draws_the_same_noise_and_scores_what_it_drew(name: str, runs: dict[str, Any]) -> None:
    before, after = runs["plain"][name], runs["ours"][name]
    assert torch.equal(before["state"], after["state"])
    assert torch.equal(after["ratio"], torch.ones(8)) and bool(after["grad"].any())
    if name != "script":
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


@pytest.mark.parametrize("rank", [0, 1], ids=["spawn", "fork server"])
def test_other_processes_compute_the_same(rank: int, runs: dict[str, Any]) -> None:
    ours, child = runs["ours"]["script"], runs["children"][rank]
    assert all(torch.equal(ours[key], child[key]) for key in ours)


def test_every_process_says_what_it_replaced_and_closes_with_a_table(runs: dict[str, Any]) -> None:
    line = (FOLDER / "peers/dancegrpo.py").read_text().partition("def flux_step")[0].count("\n") + 1
    taken = f"train.py:{line} flux_step -> dancegrpo_fast.compat.dancegrpo.flux_step"
    names = [SAID] + [f"{SAID.removesuffix(': ')} [{name}]: " for name in ("ForkServerProcess-1", "SpawnProcess-2")]
    lines = runs["said"].splitlines()
    assert sorted(said.partition("/")[0] for said in lines if taken in said) == sorted(names)
    assert sorted(said for said in lines if said.endswith(": ")) == sorted(names)
    assert sum(said.split()[-6:-3] == ["flux_step", "rollout", "4"] for said in lines) == len(names)


def test_two_processes_under_torchrun(folder: Path) -> None:
    (folder / "ranks.py").write_text(
        "import sys, torch, torch.distributed as dist\nfrom train import drive, ways\n\n"
        "dist.init_process_group('gloo')\n"
        "found = drive(ways()['import'])\ndist.all_reduce(found['grad'])\n"
        "torch.save({**found, 'argv': sys.argv[1:]}, f'{dist.get_rank()}.pt')\ndist.destroy_process_group()\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = python(folder, *launcher, *RUN, "--rounding=reference", "ranks.py", "--own", "x")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first["argv"] == second["argv"] == ["--own", "x"] and torch.equal(first["grad"], second["grad"])
    assert torch.equal(first["ratio"], torch.ones(8))
    # The first rank speaks for all.
    assert done.stderr.count("flow_grpo_step -> dancegrpo_fast.compat.mixgrpo.flow_grpo_step") == 1
