"""The ops inside torch: registration, `torch.compile`, forks, and what importing the package may load."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dancegrpo_fast
from dancegrpo_fast import policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.kernels.transition import reference
from dancegrpo_fast.transitions import cps, shifted_sigmas

from ..processes import LIMIT
from ..release import release_but
from .cases import BACKENDS, BF16, F16, F32, F64, TABLES, Case, assert_same_bits, dtype_id, make_case

# Inductor compiles what "aot_eager" would run.
COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
SIZE = 16


def op_arguments(case: Case, backend: str, rounding: bool) -> dict[str, tuple]:
    """Arguments of every registered op."""
    compute = reference.compute_dtype(case.latents, case.output, case.uncond, case.next_latents)
    table = TABLES["mixed"].packed(dtype=compute)
    step = (case.step, 0) if isinstance(case.step, Tensor) else (None, case.step)
    grad = torch.tensor([0.5, -0.25], dtype=compute)
    inputs, after = (case.latents, case.output), (case.uncond, case.scale, table, *step, rounding, backend)
    sampled, scored = (*inputs, torch.zeros_like(case.next_latents), *after), (*inputs, case.next_latents, *after)
    per_sample = (case.old_log_prob.to(compute), case.advantages.to(compute), case.weight.to(compute))
    targets = (case.reference_output, case.old_output)
    return {
        "transition_step": (*sampled, case.noise, None, None, True),
        "transition_log_prob": scored,
        "transition_log_prob_backward": (*scored, grad),
        "policy_loss": (*scored, *per_sample, *targets, 0.1, 0.2, 5.0, 0.1, True),
        "policy_loss_backward": (*scored, torch.tensor(0.5, dtype=compute), grad, grad, *targets),
    }


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (F32, BF16, F16), (BF16, BF16, BF16), (F64, F32, F32)], ids=dtype_id
)
@pytest.mark.parametrize(
    "op",
    ["transition_step", "transition_log_prob", "transition_log_prob_backward", "policy_loss", "policy_loss_backward"],
)
def test_opcheck(op: str, dtypes: tuple, cfg: bool, channels_last: bool, backend: str) -> None:
    """Schema, fake tensors (shapes, dtypes and strides) and dispatch, as torch itself checks them."""
    step = torch.tensor([1, 2]) if cfg else 1
    case = make_case((2, 3, 4, 5), TABLES["mixed"], dtypes, cfg=cfg, step=step)
    if channels_last:
        case = case.map(lambda t: t.contiguous(memory_format=torch.channels_last))
    arguments = op_arguments(case, backend, rounding=not cfg)[op]
    tests = ("test_schema", "test_faketensor")
    # What is traced depends on which arguments there are, not on their dtypes: all that dtypes change is in the fakes.
    if dtypes == (F32, BF16, F16):
        tests += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(getattr(torch.ops.dgf, op), arguments, test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_seeded_step(backend: str) -> None:
    case = make_case((2, 3, 4, 5), TABLES["flow"])
    shared = op_arguments(case, backend, rounding=False)["transition_step"][:10]
    arguments = (*shared, None, 5, torch.tensor([4, 9]), True)
    torch.library.opcheck(torch.ops.dgf.transition_step, arguments, test_utils=("test_schema", "test_faketensor"))


class Model(torch.nn.Module):
    """Matrix products only: a compiler may not change their bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layer(latents)


def sampling(model: Model, case: Case, step: int | Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        settings = {"seed": 3, "sample_ids": case.sample_ids, "return_denoised": True}
        return tuple(transition_step(case.latents, model(case.latents), TABLES["flow"], step, **settings))


def scoring(model: Model, case: Case, step: int | Tensor, **settings) -> tuple[Tensor, ...]:
    return (transition_log_prob(*replace(case, step=step).scored(TABLES["flow"], model(case.latents)), **settings),)


def rounded_scoring(model: Model, case: Case, step: int | Tensor) -> tuple[Tensor, ...]:
    return scoring(model, case, step, rounding="reference")


def losing(model: Model, case: Case, step: int | Tensor, **settings) -> tuple[Tensor, ...]:
    settings |= {"reference_output": case.reference_output, "kl_weight": 0.1, "weight": case.weight, **case.guided}
    result = policy_loss(*replace(case, step=step).lost(TABLES["flow"], model(case.latents)), **settings)
    return (result.loss, result.log_prob, result.ratio, result.has_grad, *result.metrics)


def losing_with_ratio_norm(model: Model, case: Case, step: int | Tensor) -> tuple[Tensor, ...]:
    return losing(model, case, step, ratio_norm=True, old_output=case.old_output)


LOSSES = (losing, losing_with_ratio_norm)
RUNS = (sampling, scoring, rounded_scoring, *LOSSES)
FEW = (sampling, LOSSES[-1])


def outcome(run: Callable, case: Case, step: int | Tensor) -> dict[str, Tensor]:
    model = Model()
    results = run(model, case, step)
    if results[0].requires_grad:
        results[0].sum().backward()
    found = {f"output {i}": value.detach() for i, value in enumerate(results)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def compiled() -> Callable[[Callable, str], Callable]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda run, backend: torch.compile(run, fullgraph=True, backend=backend)


@pytest.mark.parametrize("per_sample", release_but((True,), [False, True]))
@pytest.mark.parametrize("run", release_but(FEW, RUNS))
def test_compiled_bits_are_the_eager_ones(run: Callable, per_sample: bool, compiled: Callable) -> None:
    step = torch.tensor([2, 0, 1]) if per_sample else 2
    case = make_case((3, 5, SIZE), TABLES["flow"], cfg=run in LOSSES, step=step)
    eager = outcome(run, case, step)
    assert_same_bits(outcome(compiled(run, COMPILER), case, step), eager)
    assert run is sampling or "layer.weight" in eager


def assert_compiles_once(compiled: Callable, run: Callable, call: Callable, values: tuple, first: int) -> None:
    """The eager bits for each of the values, and from the one at `first` on nothing is compiled."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function, counts = compiled(run, counter), []
    for value in values:
        assert_same_bits(call(function, value), call(run, value))
        counts.append(counter.frame_count)
    assert counts[first:] == [counts[first]] * len(counts[first:])


@pytest.mark.parametrize("run", release_but(FEW, RUNS))
def test_another_step_does_not_compile_again(run: Callable, compiled: Callable) -> None:
    case = make_case((3, 5, SIZE), TABLES["flow"])
    # 0 and 1 may be special to the compiler; after them a symbol stands for every step.
    assert_compiles_once(compiled, run, lambda f, step: outcome(f, case, step), (0, 1, 2, 3, 2, 1, 0), 2)


def test_another_step_of_a_table_with_rows_without_noise_does_not_compile_again(compiled: Callable) -> None:
    """Which rows may count is asked of every step."""
    table = cps(shifted_sigmas(9, 3.0), 0.8)
    assert table.unscored == (8,)
    case = make_case((3, 5, SIZE), table)

    def run(step: int) -> Tensor:
        return policy_loss(*replace(case, step=step).lost(table)).loss

    assert_compiles_once(compiled, run, lambda f, step: {"loss": f(step)}, (2, 3, 4, 5, 6, 7, 2), 1)


def test_another_seed_does_not_compile_again(compiled: Callable) -> None:
    case = make_case((3, 5, SIZE), TABLES["flow"])

    def run(seed: int) -> Tensor:
        return transition_step(case.latents, case.output, TABLES["flow"], 2, seed=seed).latents

    seeds = (7, 8, 9, 2**40, 2**63 - 1, 12)
    assert_compiles_once(compiled, run, lambda f, seed: {"latents": f(seed)}, seeds, 1)


def test_sampling_from_torch_s_own_generator_compiles(compiled: Callable) -> None:
    case = make_case((3, 5, SIZE), TABLES["flow"])

    def run() -> Tensor:
        return transition_step(case.latents, case.output, TABLES["flow"], 2).latents

    assert compiled(run, "aot_eager")().shape == case.latents.shape


def test_compiled_write_into_a_trajectory(compiled: Callable) -> None:
    """The mutation of `out` survives functionalization, also where `out` is a view."""
    case = make_case((3, 5, SIZE), TABLES["flow"])

    def run(buffer: Tensor) -> Tensor:
        step = transition_step(buffer[:, 0], case.output, TABLES["flow"], 1, seed=3, out=buffer[:, 1])
        return step.log_prob + buffer[:, 1].sum((1, 2))

    buffers = [torch.full((3, 3, 5, SIZE), -7.0) for _ in range(2)]
    for buffer in buffers:
        buffer[:, 0] = case.latents
    results = [run(buffers[0]), compiled(run, "aot_eager")(buffers[1])]
    assert torch.equal(*results) and torch.equal(*buffers)
    assert bool((buffers[1][:, 2] == -7.0).all()) and not bool((buffers[1][:, 1] == -7.0).any())


def test_checkpointing_recomputes_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    case = make_case((3, 5, SIZE), TABLES["flow"])

    def run(model: Model, case: Case, step: int) -> tuple[Tensor, ...]:
        return checkpoint(losing, model, case, step, use_reentrant=False)

    assert_same_bits(outcome(run, case, 1), outcome(losing, case, 1))


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fork_after_the_pool_was_used() -> None:
    """The child has none of the parent's threads; its pool starts over, in every generation of children."""
    code = """
        import os, sys, torch
        torch.set_num_threads(2)
        from dancegrpo_fast import transition_step
        from dancegrpo_fast.transitions import dance_sde
        table = dance_sde((1.0, 0.5), 0.3)
        x = torch.randn(4, 100_000)
        def run():
            step = transition_step(x, x, table, 0, seed=1)
            return step.latents.numpy().tobytes() + step.log_prob.numpy().tobytes()
        wanted = run()
        def generation(depth):
            if run() != wanted:
                os._exit(3)
            if depth:
                child = os.fork()
                if child == 0:
                    generation(depth - 1)
                if os.waitpid(child, 0)[1] or run() != wanted:
                    os._exit(4)
            if depth < 3:
                os._exit(0)
        generation(3)
        print("done")
    """
    assert python(code) == "done\n"


def test_import_loads_nothing_heavy() -> None:
    code = """
        import sys
        import dancegrpo_fast
        heavy = ["triton", "diffusers", "transformers", "accelerate", "peft", "dancegrpo_fast._cpu"]
        print([name for name in [*heavy, "dancegrpo_fast.ops"] if name in sys.modules])
        dancegrpo_fast.transition_step
        import dancegrpo_fast.info
        print([name for name in heavy if name in sys.modules])
    """
    assert python(code) == "[]\n[]\n"


def test_diffusers_still_imports_its_own_kernels() -> None:
    """A package named `kernels` is optional to diffusers, and ours must not answer to that name."""
    code = "import dancegrpo_fast.ops.policy_loss; from diffusers.models.attention_dispatch import is_kernels_available"
    installed = any(one.metadata["Name"] == "kernels" for one in importlib.metadata.distributions())
    assert python(code + "; print(is_kernels_available())") == f"{installed}\n"
    root = Path(dancegrpo_fast.__file__).parent
    assert (root / "kernels" / "transition" / "reference.py").is_file()
    assert not (root / "kernels" / "__init__.py").exists()
    assert not (root / "kernels").resolve().joinpath("__init__.py").exists()
