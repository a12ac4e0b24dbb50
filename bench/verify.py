"""Checks every contender on the inputs it is timed on, before it is timed: the budget is that of the tests."""

import torch
from torch import Tensor

from dancegrpo_fast.kernels.policy_loss import reference as loss_reference
from dancegrpo_fast.kernels.transition import reference
from tests.tolerances import assert_within_budget

from . import peers
from .cases import ADVANTAGE_CLIP, CLIP_RANGE, ETA, INDEX, SEED, Call, Case, Inputs
from .plan import Plan


def _rows(inputs: Inputs, case: Case) -> Tensor:
    return inputs.table.packed(inputs.latents[0].device, torch.float64)[INDEX].expand(case.batch, -1)


def _noise_of(case: Case, inputs: Inputs, name: str, plan: Plan) -> Tensor | None:
    """The noise that a contender used on the first input set, None where torch's generator drew it."""
    if case.op == "step_given_noise":
        return inputs.noise[0]
    if name.removesuffix(", x0 too") not in plan.implementations:
        return None
    ids = torch.arange(case.batch, device=plan.device)
    return reference.normals(SEED, ids, torch.full_like(ids, INDEX), case.elements)


def _sets(case: Case, inputs: Inputs) -> range:
    """Input sets to look at: plain torch may be right by luck in a single number, but not in eight."""
    return range(min(inputs.sets, -(-8 // case.batch)))


def _assert_scores(case: Case, inputs: Inputs, scored: list[tuple[Tensor, Tensor]]) -> None:
    """Log-probabilities of given next latents, each of one input set."""
    rows, truth, plain = _rows(inputs, case), [], []
    for i, (stored, _) in enumerate(scored):
        x, v = inputs.latents[i], inputs.outputs[i]
        truth.append(reference.score(x.double(), v.double(), stored.double(), None, 1.0, rows, None))
        plain.append(peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, stored)[2])
    assert_within_budget(torch.cat([log_prob for _, log_prob in scored]), torch.cat(truth), torch.cat(plain))


def _check_step(case: Case, inputs: Inputs, name: str, contenders: dict[str, Call], plan: Plan) -> None:
    results = [contenders[name](i) for i in _sets(case, inputs)]
    noise = _noise_of(case, inputs, name, plan)
    if noise is not None:
        x, v, rows = inputs.latents[0], inputs.outputs[0], _rows(inputs, case)
        truth = reference.step(x.double(), v.double(), None, 1.0, rows, noise.double(), torch.float64, None)[0]
        plain = peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, None, noise)[0]
        assert_within_budget(results[0][0], truth, plain)
    # What was stored can be scored again, whoever drew the noise.
    _assert_scores(case, inputs, [(stored, log_prob) for stored, log_prob in results])


def _check_score(case: Case, inputs: Inputs, name: str, contenders: dict[str, Call], plan: Plan) -> None:
    found = [(inputs.next_latents[i], contenders[name](i)[0]) for i in _sets(case, inputs)]
    _assert_scores(case, inputs, found)


def _check_loss(case: Case, inputs: Inputs, name: str, contenders: dict[str, Call], plan: Plan) -> None:
    losses: list[tuple[Tensor, ...]] = []
    grads: list[tuple[Tensor, ...]] = []
    for i in _sets(case, inputs):
        x, v, x_next, rows = inputs.latents[i], inputs.outputs[i], inputs.next_latents[i], _rows(inputs, case)
        old, advantages = inputs.old_log_prob[i], inputs.advantages
        exact = (x.double(), v.double(), x_next.double(), None, 1.0, rows, None)
        truth = loss_reference.policy_loss(
            *exact,
            old.double(),
            advantages.double(),
            torch.ones(case.batch, device=plan.device),
            None,
            None,
            CLIP_RANGE,
            CLIP_RANGE,
            ADVANTAGE_CLIP,
            0.0,
            False,
        )
        true_grad = reference.gradient(*exact, truth.step_scale, None, None, None)[0]
        plain_loss, plain_grad = contenders["eager"](i)
        # The budget of a loss is at least what the error of its log-probabilities amounts to.
        plain_score = peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, x_next)[2]
        carried = (advantages.abs() * (plain_score.double() - truth.log_prob).abs()).mean()
        budget_loss = truth.loss + torch.maximum((plain_loss.double() - truth.loss).abs(), carried)
        loss, grad = contenders[name](i)
        losses.append((loss.detach(), truth.loss, budget_loss.float().detach()))
        grads.append((grad, true_grad, plain_grad))
    for values in (losses, grads):
        found, exactly, plain = (torch.stack(column) for column in zip(*values, strict=True))
        assert_within_budget(found, exactly, plain)


_CHECKS = {"policy_loss": _check_loss, "log_prob": _check_score}


def failures(case: Case, inputs: Inputs, contenders: dict[str, Call], plan: Plan) -> dict[str, str]:
    """The contenders whose result is not the reference's, and by how much."""
    check_one = _CHECKS.get(case.op, _check_step)
    found = {}
    for name in contenders:
        try:
            check_one(case, inputs, name, contenders, plan)
        except AssertionError as error:
            found[name] = str(error)
    return found
