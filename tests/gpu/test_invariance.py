"""Bits that must not change with the batch, the layout or the run, and a first ratio of exactly 1."""

from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import policy_loss

from ..ops.cases import BF16, DTYPES, F16, F32, TABLES, assert_same_bits, bits, dtype_id, make_case, sample
from ..ops.test_invariance import STEPS, joined
from ..ops.test_transition import LAYOUTS
from .calls import results
from .targets import Target, on, on_every_target

MIXES = ((F32, F32, F32), (F32, BF16, BF16), (F16, F16, F32))


@on_every_target
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("dtypes", MIXES, ids=dtype_id)
def test_micro_batches(target: Target, dtypes: tuple, rounding: str) -> None:
    """Powers of two, so that the mean over the batch scales gradients exactly."""
    table = TABLES["flow"]
    case = on(make_case((8, 3, 1701), table, dtypes, cfg=True, step=STEPS), target)
    whole = results(case, table, target.backend, rounding)
    for size in (1, 2, 4):
        parts = [results(case.select(slice(i, i + size)), table, target.backend, rounding) for i in range(0, 8, size)]
        assert_same_bits(joined(parts), whole)


@on_every_target
@pytest.mark.parametrize("dtypes", MIXES, ids=dtype_id)
def test_position_in_the_batch(target: Target, dtypes: tuple) -> None:
    table = TABLES["dance"]
    case = on(make_case((8, 17, 301), table, dtypes, step=STEPS), target)
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    whole = results(case, table, target.backend)
    again = results(case.select(order), table, target.backend)
    assert_same_bits(again, {name: value[order] for name, value in whole.items()})
    same = results(case.select([3] * 512), table, target.backend)
    assert all(torch.equal(value, value[:1].expand_as(value)) for value in same.values())
    assert torch.equal(same["score"][:1], whole["score"][3:4])


@on_every_target
@pytest.mark.parametrize("shape", [(3, 70_001), (64, 5000), (513, 2)], ids=str)
def test_every_run_gives_the_same_bits(target: Target, shape: tuple[int, ...]) -> None:
    table = TABLES["flow"]
    case = on(make_case(shape, table, (F32, BF16, F32)), target)
    first = results(case, table, target.backend)
    for _ in range(3):
        assert_same_bits(results(case, table, target.backend), first)


@on_every_target
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [((2, 4, 9, 70), (F32, F32, F32)), ((2, 4, 3, 6, 17), (BF16, F16, BF16))],
    ids=["image", "video"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_misaligned_tensors(target: Target, layout: str, dtypes: tuple, shape: tuple[int, ...]) -> None:
    table = TABLES["flow"]
    packed = on(make_case(shape, table, dtypes, cfg=True), target)
    found = results(packed.map(LAYOUTS[layout]), table, target.backend)
    assert_same_bits(found, results(packed, table, target.backend))


@on_every_target
@pytest.mark.parametrize("layout", ["odd offset", "slice", "crop", "trajectory"])
def test_outputs_of_any_layout_and_nothing_beside_them(target: Target, layout: str) -> None:
    """What lies around and between the elements keeps its NaN."""
    table = TABLES["flow"]
    case = on(make_case((3, 5, 7, 301), table, (F32, BF16, BF16)), target)
    wanted = sample(case, table, seed=3, out_dtype=BF16, backend=target.backend)
    out = LAYOUTS[layout](torch.full(case.latents.shape, float("nan"), dtype=BF16, device=target.device))
    whole = torch.tensor([], dtype=BF16, device=target.device).set_(out.untyped_storage())
    whole.fill_(float("nan"))
    found = sample(case, table, seed=3, out=out, backend=target.backend)
    assert bits(found.latents.cpu()) == bits(wanted.latents.cpu())
    assert int(whole.isfinite().sum()) == out.numel()


@on_every_target
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_first_ratio_is_exactly_one(target: Target, dtypes: tuple, cfg: bool, rounding: str, seeded: bool) -> None:
    """Also where replay sees other batches than rollout did."""
    if not target.holds(*dtypes):
        pytest.skip("Triton computes in float32")
    table = TABLES["mixed"]
    case = on(make_case((4, 5031), table, dtypes, cfg=cfg, step=torch.tensor([2, 0, 3, 1])), target)
    settings = {"seed": 9} if seeded else {}
    step = sample(case, table, rounding=rounding, out_dtype=dtypes[2], backend=target.backend, **settings)
    case = replace(case, next_latents=step.latents, old_log_prob=step.log_prob)
    for part in (slice(0, 4), slice(1, 2), slice(1, 4)):
        settings = {"weight": case.weight[part], "rounding": rounding, "backend": target.backend}
        mine = case.select(part)
        result = policy_loss(*mine.lost(table), **mine.guided, **settings)
        assert torch.equal(result.ratio, torch.ones_like(result.ratio))
        assert result.metrics.ratio_max_dev == 0.0 and result.metrics.approx_kl == 0.0
