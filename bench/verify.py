"""Checks every contender on the inputs it is timed on, before it is timed: the budget is that of the tests."""

import torch
from torch import Tensor

from dancegrpo_fast.kernels.policy_loss import reference as loss_reference
from dancegrpo_fast.kernels.transition import reference
from tests.tolerances import assert_within_budget

from . import peers
from .cases import ADVANTAGE_CLIP, CLIP_RANGE, ETA, INDEX, SEED, Call, Case, Inputs


def _rows(inputs: Inputs, case: Case) -> Tensor:
    return inputs.table.packed(torch.device("cpu"), torch.float64)[INDEX].expand(case.batch, -1)


def _noise_of(case: Case, inputs: Inputs, name: str) -> Tensor | None:
    """The noise that a contender used on the first input set, None where torch's generator drew it."""
    if case.op == "step_given_noise":
        return inputs.noise[0]
    if name not in ("ours", "ours, x0 too"):
        return None
    steps = torch.full((case.batch,), INDEX)
    return reference.normals(SEED, torch.arange(case.batch), steps, case.elements)


def _check_step(case: Case, inputs: Inputs, name: str, contenders: dict[str, Call]) -> None:
    x, v, rows = inputs.latents[0], inputs.outputs[0], _rows(inputs, case)
    stored, log_prob = contenders[name](0)
    noise = _noise_of(case, inputs, name)
    if noise is not None:
        truth = reference.step(x.double(), v.double(), None, 1.0, rows, noise.double(), torch.float64, None)[0]
        plain = peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, None, noise)[0]
        assert_within_budget(stored, truth, plain)
    # What was stored can be scored again, whoever drew the noise.
    score = reference.score(x.double(), v.double(), stored.double(), None, 1.0, rows, None)
    assert_within_budget(log_prob, score, peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, stored)[2])


def _check_loss(case: Case, inputs: Inputs, name: str, contenders: dict[str, Call]) -> None:
    x, v, x_next, rows = inputs.latents[0], inputs.outputs[0], inputs.next_latents[0], _rows(inputs, case)
    old, advantages = inputs.old_log_prob[0], inputs.advantages
    exact = (x.double(), v.double(), x_next.double(), None, 1.0, rows, None)
    truth = loss_reference.policy_loss(
        *exact,
        old.double(),
        advantages.double(),
        torch.ones(case.batch),
        None,
        None,
        CLIP_RANGE,
        ADVANTAGE_CLIP,
        0.0,
        False,
    )
    true_grad = reference.gradient(*exact, truth.step_scale, None, None, None)[0]
    plain_loss, plain_grad = contenders["eager"](0)
    # By luck the plain loss may be exact; its budget is what the error of its log-probabilities amounts to.
    plain_score = peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, x_next)[2]
    carried = (advantages.abs() * (plain_score.double() - truth.log_prob).abs()).mean()
    budget_loss = truth.loss + torch.maximum((plain_loss.double() - truth.loss).abs(), carried)
    loss, grad = contenders[name](0)
    assert_within_budget(loss.detach(), truth.loss, budget_loss.float().detach())
    assert_within_budget(grad, true_grad, plain_grad)


def failures(case: Case, inputs: Inputs, contenders: dict[str, Call]) -> dict[str, str]:
    """The contenders whose result is not the reference's, and by how much."""
    check_one = _check_loss if case.op == "policy_loss" else _check_step
    found = {}
    for name in contenders:
        try:
            check_one(case, inputs, name, contenders)
        except AssertionError as error:
            found[name] = str(error)
    return found
