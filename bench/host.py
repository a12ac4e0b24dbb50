"""Host cost: a call so small (1 x 64) that only Python, dispatch and allocation are left, in microseconds."""

import torch

import dancegrpo_fast as dgf

from .cases import ETA, INDEX, SEED, SHIFT, STEPS
from .harness import Run, Timing, interleave

ELEMENTS = 64


def measure(rounds: int) -> dict[str, Timing]:
    """Name of the public function -> timing of one call (milliseconds, as everywhere)."""
    table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(STEPS, SHIFT), ETA)
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(1, ELEMENTS, generator=generator) for _ in range(3))
    leaf, ids, advantages = v.clone().requires_grad_(), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    stepped = dgf.transition_step(x, v, table, INDEX, noise=noise)
    rewards = torch.randn(8, generator=generator)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        leaf.grad = None

    def loss() -> torch.Tensor:
        return dgf.policy_loss(x, leaf, stepped.latents, table, INDEX, stepped.log_prob, advantages).loss

    calls: dict[str, Run] = {
        "transition_step(seed=)": lambda i: dgf.transition_step(x, v, table, INDEX, seed=SEED),
        "transition_step(noise=)": lambda i: dgf.transition_step(x, v, table, INDEX, noise=noise),
        "transition_step()": lambda i: dgf.transition_step(x, v, table, INDEX),
        "transition_log_prob": lambda i: dgf.transition_log_prob(x, v, stepped.latents, table, INDEX),
        "transition_log_prob + backward": lambda i: backward(
            dgf.transition_log_prob(x, leaf, stepped.latents, table, INDEX).sum()
        ),
        "policy_loss": lambda i: loss(),
        "policy_loss + backward": lambda i: backward(loss()),
        "gaussian_noise": lambda i: dgf.gaussian_noise((ELEMENTS,), seed=SEED, sample_ids=ids),
        "group_advantages": lambda i: dgf.group_advantages(rewards, 8),
    }
    return interleave(calls, rounds)
