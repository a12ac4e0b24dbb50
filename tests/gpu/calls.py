"""Every public op as a function without arguments, on inputs of one case."""

from collections.abc import Callable

import torch
from torch import Tensor

from dancegrpo_fast import policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.transitions import TransitionTable

from ..ops.cases import Case, everything
from .targets import at_home


def calls_of(case: Case, table: TransitionTable, backend: str) -> dict[str, Callable[[], object]]:
    """The calls that are one launch each; the backward ones run on a graph that is kept."""
    guidance = case.guided | {"backend": backend}
    leaf = case.output.detach().clone().requires_grad_()
    step, scored = case.stepped(table), case.scored(table, leaf)
    one = torch.ones((), device=case.latents.device)
    log_prob = transition_log_prob(*scored, **guidance)
    weight = torch.ones_like(log_prob)

    def loss() -> Tensor:
        return policy_loss(*case.lost(table, leaf), weight=weight, **guidance).loss

    kept = loss()
    return {
        "seeded step": lambda: transition_step(*step, seed=5, sample_ids=case.sample_ids, **guidance),
        "step with x0": lambda: transition_step(*step, noise=case.noise, return_denoised=True, **guidance),
        "log_prob": lambda: transition_log_prob(*scored, **guidance),
        "log_prob backward": lambda: torch.autograd.grad(log_prob, leaf, weight, retain_graph=True),
        "loss": loss,
        "loss backward": lambda: torch.autograd.grad(kept, leaf, one, retain_graph=True),
    }


def results(case: Case, table: TransitionTable, backend: str, rounding: str = "exact") -> dict[str, Tensor]:
    """All outputs of a sample, on the CPU."""
    return at_home(everything(case, table, rounding=rounding, backend=backend))
