"""Host cost: a call so small (1 x 64) that only Python, dispatch and allocation are left, in microseconds."""

from typing import Any

import torch

import dancegrpo_fast as dgf

from .cases import ETA, INDEX, SEED, SHIFT, STEPS
from .clocks import Run
from .harness import Timing, interleave
from .plan import Plan

ELEMENTS = 64


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
        return dgf.policy_loss(
            x, leaf, stepped.latents, table, INDEX, stepped.log_prob, advantages, backend=backend
        ).loss

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


def measure(rounds: int, plan: Plan) -> dict[str, Timing]:
    """Name of the function -> timing of one call (milliseconds, as everywhere)."""
    found: dict[str, Run] = {}
    for backend in plan.implementations.values():
        prefix = "" if backend == "auto" else f"{backend}: "
        found |= {prefix + name: run for name, run in calls(backend, plan.device).items()}
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0)).to(plan.device)
    found["group_advantages"] = lambda i: dgf.group_advantages(rewards, 8)
    return interleave(found, rounds, clock=plan.host_clock)
