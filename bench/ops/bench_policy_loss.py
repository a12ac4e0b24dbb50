"""The loss of one denoising step and its gradient: log-probability, ratio, clip, mean, `backward()`.

Nothing is clipped: a clipped sample would skip most of our backward.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf
from bench import peers
from bench.place import Place, place_of
from bench.turns import Contest, cross
from dancegrpo_fast.kernels.policy_loss import reference as loss_reference
from dancegrpo_fast.kernels.transition import reference
from tests.tolerances import assert_within_budget

from .latents import ETA, INDEX, Call, Case, Inputs, cases

CLIP_RANGE, ADVANTAGE_CLIP = 1e-4, 5.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape."""
    place = place_of(metafunc.config.getoption("--device"))
    cross(metafunc, list(cases(place)), ["eager", "compile", *place.ours])


def test_policy_loss(case: Case, place: Place, contest: Any) -> None:
    """Forward and backward."""
    contest(lambda: _losses(case, place))


def _losses(case: Case, place: Place) -> Contest:
    inputs = Inputs(case, place, scored=True)

    def differentiate(i: int, loss: Tensor) -> tuple[Tensor, ...]:
        loss.backward()
        leaf = inputs.leaves[i]
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        return loss, grad

    def peer(loss: Any, sigmas: Tensor) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            v, x, x_next, old = inputs.leaves[i], inputs.latents[i], inputs.next_latents[i], inputs.old_log_prob[i]
            clips = (CLIP_RANGE, ADVANTAGE_CLIP)
            return differentiate(i, loss(v, x, ETA, sigmas, INDEX, x_next, old, inputs.advantages, *clips))

        return call

    def ours(backend: str) -> Call:
        options: dict[str, Any] = {"clip_range": CLIP_RANGE, "advantage_clip": ADVANTAGE_CLIP, "backend": backend}

        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            x, v, x_next, old = inputs.latents[i], inputs.leaves[i], inputs.next_latents[i], inputs.old_log_prob[i]
            return differentiate(
                i, dgf.policy_loss(x, v, x_next, inputs.table, INDEX, old, inputs.advantages, **options).loss
            )

        return call

    calls = {name: peer(*pair) for name, pair in inputs.peers(peers.policy_loss).items()}
    calls |= {name: ours(backend) for name, backend in place.ours.items()}

    def check(name: str) -> None:
        losses: list[tuple[Tensor, ...]] = []
        grads: list[tuple[Tensor, ...]] = []
        advantages, rows = inputs.advantages, inputs.rows()
        ones = torch.ones(case.batch, device=place.device)
        for i in inputs.few():
            x, v, x_next = inputs.latents[i], inputs.outputs[i], inputs.next_latents[i]
            exact = (x.double(), v.double(), x_next.double(), None, 1.0, rows, None)
            old = inputs.old_log_prob[i].double()
            clips = (CLIP_RANGE, CLIP_RANGE, ADVANTAGE_CLIP, 0.0, False)
            truth = loss_reference.policy_loss(*exact, old, advantages.double(), ones, None, None, *clips)
            true_grad = reference.gradient(*exact, truth.step_scale, None, None, None)[0]
            plain_loss, plain_grad = calls["eager"](i)
            # The budget of a loss is at least what the error of its log-probabilities amounts to.
            plain_score = peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, x_next)[2]
            carried = (advantages.abs() * (plain_score.double() - truth.log_prob).abs()).mean()
            budget_loss = truth.loss + torch.maximum((plain_loss.double() - truth.loss).abs(), carried)
            loss, grad = calls[name](i)
            losses.append((loss.detach(), truth.loss, budget_loss.float().detach()))
            grads.append((grad, true_grad, plain_grad))
        for values in (losses, grads):
            found, exactly, plain = (torch.stack(column) for column in zip(*values, strict=True))
            assert_within_budget(found, exactly, plain)

    # Two passes read everything: the gradient's factor depends on the whole sample, and nothing is kept between them.
    v = case.output_dtype.itemsize
    return inputs.contest("policy_loss", calls, check, 2 * (4 + v + 4) + v, {})
