"""Ours against the projects' own functions, where `DGF_PEERS` names a folder with their checkouts."""

import pytest
import torch

from ..tolerances import SAMPLE
from .cases import BF16, F32
from .real_peers import FOLDER, ROWS, Real, measure

pytestmark = pytest.mark.skipif(FOLDER is None, reason="DGF_PEERS names no folder with the projects' checkouts")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_project_s_own_function(row: Real, dtype: torch.dtype) -> None:
    theirs = row.theirs()
    if theirs is None:
        pytest.skip(f"{row.path} of {row.project} at {row.commit or 'its checkout'} is not to be had")
    published = measure(row, theirs, dtype, "reference")
    if row.name != "ddim_step_with_logprob":  # computed from a table there, too
        assert published.next_latents == published.others == 0
    assert published.next_latents <= SAMPLE * max(1.0, published.scale)
    assert published.log_prob <= SAMPLE * max(1.0, published.score_scale)
    assert published.ratio == 0
    exact = measure(row, theirs, dtype, "exact")
    assert exact.ratio == 0
    if dtype == F32:  # in half precision theirs rounds its products, which the others are free of
        rounding = SAMPLE if row.latents == F32 else torch.finfo(row.latents).eps
        assert exact.next_latents <= rounding * max(1.0, exact.scale)
        assert exact.log_prob <= SAMPLE * max(1.0, exact.score_scale)
