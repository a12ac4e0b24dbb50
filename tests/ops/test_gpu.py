"""The ops on a CUDA device, whichever backend "auto" picks there."""

import pytest
import torch

from dancegrpo_fast import gaussian_noise, policy_loss, transition_step

from ..tolerances import assert_same_noise
from .cases import BF16, F32, TABLES, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["flow", "mixed"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ratio_is_one_on_policy(name: str, dtype: torch.dtype) -> None:
    table = TABLES[name]
    case = make_case((3, 700), table, (F32, dtype, F32)).map(lambda t: t.cuda())
    stepped = transition_step(case.latents, case.output, table, 1, seed=3)
    output = case.output.clone().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5], device="cuda")
    result = policy_loss(case.latents, output, stepped.latents, table, 1, stepped.log_prob, advantages)
    result.loss.backward()
    assert bool((result.ratio == 1.0).all())
    assert bool(output.grad.isfinite().all())


def test_noise_is_that_of_the_cpu() -> None:
    ids = torch.arange(5) + 2**40
    there = gaussian_noise((1003,), seed=9, sample_ids=ids.cuda()).cpu()
    here = gaussian_noise((1003,), seed=9, sample_ids=ids)
    assert_same_noise(there, here)
