"""Each replaced function against its peer's arithmetic: values, gradients, shapes, randomness."""

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers.utils import torch_utils
from torch import Tensor

from ..tolerances import assert_within_budget
from .cases import BF16, CASES, F32, F64, Case, draw, seeded

pytestmark = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """The same noise for every dtype, exact in all of them."""
    drawn = draw(BF16, 3)
    monkeypatch.setattr(torch, "randn_like", lambda like, **_: drawn.to(like.dtype))
    monkeypatch.setattr(torch_utils, "randn_tensor", lambda shape, dtype, **_: drawn.to(dtype))
    return drawn


def inputs(dtype: torch.dtype, case: Case) -> tuple[Tensor, Tensor]:
    """Model output and latents."""
    return draw(dtype, 1), draw(case.latents, 2)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sampling(name: str, dtype: torch.dtype, noise: Tensor) -> None:
    case, (v, x) = CASES[name], inputs(dtype, CASES[name])
    found = case.ours(v, x, None)
    truth = case.peer(v.double(), x.double(), None, dtype=F64)
    plain = case.peer(v.float(), x, None)
    for key in found.keys() - {"log_prob"}:  # that of another sample: scored below
        assert_within_budget(found[key], truth[key].double(), plain[key])
    again = case.ours(v, x, found["next"])
    assert torch.equal(torch.exp(again["log_prob"] - found["log_prob"]), torch.ones(len(x)))


def scored(
    call: Callable[..., dict[str, Tensor]], v: Tensor, x: Tensor, after: Tensor, **settings
) -> dict[str, Tensor]:
    """The score of `after`, and the gradients of it and of the mean."""
    output, latents = v.detach().requires_grad_(), x.detach().requires_grad_()
    found = call(output, latents, after, **settings)
    total = (found["log_prob"] * draw(F64, 4, (len(x),)).to(found["log_prob"].dtype)).sum()
    if "mean" in found:
        total = total + (found["mean"] * draw(F64, 5).to(found["mean"].dtype)).sum()
    grads = torch.autograd.grad(total, (output, latents), allow_unused=True)
    return {"log_prob": found["log_prob"].detach(), "grad": grads[0], "grad_latents": grads[1]}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scores_and_gradients(name: str, dtype: torch.dtype, noise: Tensor) -> None:
    case, (v, x) = CASES[name], inputs(dtype, CASES[name])
    after = case.peer(v, x, None)["next"]
    found = scored(case.ours, v, x, after)
    truth = scored(case.peer, v.double(), x.double(), after.double(), dtype=F64)
    plain = scored(case.peer, v.float(), x, after)
    assert found["grad_latents"] is None
    assert_within_budget(found["log_prob"], truth["log_prob"], plain["log_prob"])
    assert_within_budget(found["grad"], truth["grad"], plain["grad"].to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reference_rounding(name: str, dtype: torch.dtype, noise: Tensor) -> None:
    case, (v, x) = CASES[name], inputs(dtype, CASES[name])
    found = case.ours(v, x, None, rounding="reference")
    plain = case.peer(v, x, None)
    # A peer's products with a low-precision output are low-precision in wide latents too.
    truth = case.peer(v, x.double(), None, dtype=F64)
    if case.same_bits:
        assert torch.equal(found["next"], plain["next"])
    for key in found.keys() - {"log_prob"}:
        assert_within_budget(found[key], truth[key].double(), plain[key])
    after = plain["next"]
    again = scored(case.ours, v, x, after, rounding="reference")
    plain = scored(case.peer, v, x, after)
    truth = scored(case.peer, v, x.double(), after.double(), dtype=F64)
    assert_within_budget(again["log_prob"], truth["log_prob"].double(), plain["log_prob"])
    if case.same_scores:
        assert torch.equal(again["log_prob"], plain["log_prob"])
    # Autograd rounds the gradient of a low-precision output in every product: the truth takes that of the latents.
    smooth = scored(case.peer, v.double(), x.double(), after.double(), dtype=F64)
    through = truth["grad_latents"] * (smooth["grad"] / smooth["grad_latents"]).nan_to_num()
    assert_within_budget(again["grad"], through, plain["grad"])


@pytest.mark.pairs
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_randomness(name: str, dtype: torch.dtype, layout: torch.memory_format, given: bool) -> None:
    case, (v, x) = CASES[name], [t.contiguous(memory_format=layout) for t in inputs(dtype, CASES[name])]
    after = draw(F32, 6) if given else None
    plain = seeded(7, case.peer, v, x, after)
    state = torch.get_rng_state()
    for rounding in ("exact", "reference"):
        found = seeded(7, case.ours, v, x, after, rounding=rounding)
        assert torch.equal(torch.get_rng_state(), state)
    if case.same_bits:
        assert torch.equal(found["next"], plain["next"])


@pytest.mark.pairs
@pytest.mark.parametrize("latents", [BF16, torch.float16])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
def test_what_the_script_keeps_is_scored(name: str, rounding: str, latents: torch.dtype, noise: Tensor) -> None:
    case, (v, x) = CASES[name], inputs(BF16, CASES[name])
    plain = case.ours(v, x, None, rounding=rounding)
    found = case.ours(v, x, None, rounding=rounding, latents_dtype=latents)
    kept = found["next"].to(latents)
    assert torch.equal(kept.to(plain["next"].dtype), found["next"])
    assert torch.equal(plain["next"].to(latents), kept)
    again = case.ours(v, x, kept.to(found["next"].dtype), rounding=rounding, latents_dtype=latents)
    assert torch.equal(torch.exp(again["log_prob"] - found["log_prob"]), torch.ones(len(x)))
