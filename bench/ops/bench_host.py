"""Host cost: a call so small (1 x 64) that only Python, dispatch and allocation are left.

On a CPU block ops launch nothing: their Triton kernels are compiled for an H100, and a stub stands for the launcher.
On a GPU each public function also has what one call of it launches, and whether it makes the host wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import dancegrpo_fast as dgf
from bench.clocks import Run
from bench.place import Place, place_of
from bench.rows import Row
from bench.turns import Contest, cross
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope
from tests.gpu.activity import device_activity, ops_that_launch, profiler_sees_kernels, waits_for_the_device

from . import block_peers as peers
from .latents import ETA, INDEX, SEED, SHIFT, STEPS

ELEMENTS = 64
ADVANTAGES = "group_advantages"
# Of the block ops.
TOKENS, HEADS, DIM = 64, 2, 128
TRAINED = ", trained"


@dataclass(frozen=True)
class Case:
    """The only one. A profiler slows the calls after it, so it is the last case of a run."""

    rank: int = 9

    def __str__(self) -> str:
        return f"1x{ELEMENTS}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every public function of every backend; block ops where no GPU times them."""
    place = place_of(metafunc.config.getoption("--device"))
    if metafunc.function is test_block_host:
        there = place.blocks is None and find_spec("triton") is not None
        cross(metafunc, [Blocks()] if there else [], BLOCKS, "stubs launch where there is no GPU but Triton")
        return
    names = [prefix(backend) + name for backend in place.ours.values() for name in FUNCTIONS]
    cross(metafunc, [Case()], [*names, ADVANTAGES])


def test_host(case: Case, place: Place, contest: Any) -> None:
    """All of them take turns."""
    contest(lambda: _functions(place))


@dataclass(frozen=True)
class Blocks(Case):
    """One sample of few tokens; what the host does depends on neither."""

    def __str__(self) -> str:
        return f"1x{TOKENS}x{HEADS * DIM}"


def test_block_host(case: Blocks, place: Place, contest: Any, tmp_path: Path) -> None:
    """Forward of each block op, with and without gradients, beside diffusers' own."""
    from tests.triton import offline

    with offline.launching(offline.Launcher, tmp_path):
        contest(lambda: Contest(block_calls(), lambda name: None, lambda name: {"op": "block host"}, place.host_clock))


def block_calls() -> dict[str, Run]:
    """Name of the op -> one forward."""
    channels, generator = HEADS * DIM, torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"mode": "fast", "backend": "triton"}

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, y = random(1, TOKENS, channels), random(1, TOKENS, channels)
    gate, scale, shift = (random(1, channels) for _ in range(3))
    q, k = random(1, TOKENS, HEADS, DIM), random(1, TOKENS, HEADS, DIM)
    q_weight, k_weight = random(DIM), random(DIM)
    cos, sin = random(TOKENS, DIM, dtype=torch.float32), random(TOKENS, DIM, dtype=torch.float32)
    norms = peers.norm_modulate(3)
    turned = peers.flux_qk(cos, sin, joint=False)
    pairs: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], object], Callable[[torch.Tensor], object]]] = {
        "norm_modulate, 3 consumers": (
            x,
            lambda t: norm_modulate_fanout(t, scale, shift, consumers=3, **how),
            lambda t: norms(t, scale, shift),
        ),
        "gated_residual_norm_modulate": (
            x,
            lambda t: gated_residual_norm_modulate(t, y, gate, scale, shift, **how),
            lambda t: peers.gated_residual_norm_modulate(t, y, gate, scale, shift),
        ),
        "gated_residual": (x, lambda t: gated_residual(t, y, gate, **how), lambda t: peers.gated_residual(t, y, gate)),
        "qk_norm_rope": (
            q,
            lambda t: qk_norm_rope(Stream(t, k, q_weight, k_weight, cos, sin), **how),
            lambda t: turned(t, k, q_weight, k_weight),
        ),
        "gelu_tanh": (x, lambda t: gelu_tanh(t, **how), peers.gelu_tanh),
    }
    found: dict[str, Run] = {}
    for name, (plain, ours, peer) in pairs.items():
        leaf = plain.clone().requires_grad_()
        for whose, call in (("", ours), ("eager: ", peer)):
            found[whose + name] = partial(_of, call, plain)
            found[whose + name + TRAINED] = partial(_of, call, leaf)
    return found


def _of(call: Callable[[torch.Tensor], object], tensor: torch.Tensor, i: int) -> object:
    return call(tensor)


BLOCKS = tuple(block_calls())


def prefix(backend: str) -> str:
    """Before the names of a backend's functions."""
    return "" if backend == "auto" else f"{backend}: "


def calls(backend: str, device: torch.device) -> dict[str, Run]:
    """Name of the function -> one call."""
    table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(STEPS, SHIFT), ETA)
    generator = torch.Generator(device).manual_seed(0)
    x, v, noise = (torch.randn(1, ELEMENTS, generator=generator, device=device) for _ in range(3))
    ids, advantages = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device)
    leaf = v.clone().requires_grad_()
    stepped = dgf.transition_step(x, v, table, INDEX, noise=noise, backend=backend)
    packed = table.packed(device)

    def op(i: int) -> Any:
        shared = (x, v, torch.empty_like(x), None, 1.0, packed, None, INDEX, False, backend)
        return torch.ops.dgf.transition_step(*shared, None, SEED, None, False)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        leaf.grad = None

    def score(output: torch.Tensor) -> torch.Tensor:
        return dgf.transition_log_prob(x, output, stepped.latents, table, INDEX, backend=backend)

    def loss() -> torch.Tensor:
        stored = (stepped.latents, table, INDEX, stepped.log_prob, advantages)
        return dgf.policy_loss(x, leaf, *stored, backend=backend).loss

    return {
        "transition_step(seed=)": lambda i: dgf.transition_step(x, v, table, INDEX, seed=SEED, backend=backend),
        "torch.ops.dgf.transition_step": op,
        "transition_step(noise=)": lambda i: dgf.transition_step(x, v, table, INDEX, noise=noise, backend=backend),
        "transition_step()": lambda i: dgf.transition_step(x, v, table, INDEX, backend=backend),
        "transition_log_prob": lambda i: score(v),
        "transition_log_prob + backward": lambda i: backward(score(leaf).sum()),
        "policy_loss": lambda i: loss(),
        "policy_loss + backward": lambda i: backward(loss()),
        "gaussian_noise": lambda i: dgf.gaussian_noise((ELEMENTS,), seed=SEED, sample_ids=ids, backend=backend),
    }


FUNCTIONS = tuple(calls("reference", torch.device("cpu")))


def launches(run: Run, place: Place) -> Row:
    """What one call starts; in a dry run the torch operators that would, ours included."""
    call = partial(run, 0)
    if place.dry:
        return {"kernels": len(ops_that_launch(call)), "memory_operations": 0, "waits": False}
    if place.device.type != "cuda" or not profiler_sees_kernels():
        return {}
    kernels, memory = device_activity(call)
    waits = waits_for_the_device(call)
    return {"kernels": len(kernels), "memory_operations": len(memory), "waits": waits, "names": kernels + memory}


def _functions(place: Place) -> Contest:
    found: dict[str, Run] = {}
    for backend in place.ours.values():
        found |= {prefix(backend) + name: run for name, run in calls(backend, place.device).items()}
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0)).to(place.device)
    found[ADVANTAGES] = lambda i: dgf.group_advantages(rewards, 8)

    def info(name: str) -> Row:
        # Behind all timings.
        return {"op": "host", **launches(found[name], place)}

    # Whether they are right is asked at the shapes that they are made for.
    return Contest(found, lambda name: None, info, place.host_clock)
