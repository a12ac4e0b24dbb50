"""Sampling, scoring and their gradient by Triton against the definition and against the C++ kernel.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

import math
from functools import cache

import pytest
import torch

from dancegrpo_fast import transition_log_prob, transition_step
from dancegrpo_fast.ops import _triton

from ..ops import test_invariance, test_noise, test_policy_loss_edges, test_transition
from ..ops.cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    TABLES,
    Case,
    assert_same_bits,
    bits,
    dtype_id,
    everything,
    make_case,
    sample,
    score,
)
from ..release import release_but
from ..tolerances import assert_same_noise

FLOAT32 = tuple(dtypes for dtypes in DTYPES if F64 not in dtypes)
BLOCK = _triton.BLOCK
# One element, around the kernels' block and in its second, and many samples of little.
SHAPES = ((3, 1), (2, 13), (2, BLOCK - 1), (2, BLOCK), (1, BLOCK + 1), (12, 2), (2, 4, 3, 6, 5))


@pytest.mark.parametrize("name", release_but(("dance", "cps", "ddim"), TABLES))
def test_every_sampler(name: str) -> None:
    case = make_case((3, 5, 123), TABLES[name], (F32, BF16, F32))
    test_transition.assert_matches_reference(case, TABLES[name], F32, backend="triton")


@pytest.mark.parametrize("shape", release_but((SHAPES[0], SHAPES[4], SHAPES[6]), SHAPES), ids=str)
def test_every_shape(shape: tuple[int, ...]) -> None:
    case = make_case(shape, TABLES["flow"], cfg=True)
    test_transition.assert_matches_reference(case, TABLES["flow"], F32, backend="triton")


@pytest.mark.pairs
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("dtypes", release_but(FLOAT32[:3], FLOAT32), ids=dtype_id)
def test_dtypes_guidance_rounding_and_mixed_steps(dtypes: tuple, cfg: bool, rounding: str) -> None:
    table = TABLES["mixed"]
    case = make_case((4, 3, 61), table, dtypes, cfg=cfg, step=torch.tensor([3, 1, 0, 2]))
    test_transition.assert_matches_reference(case, table, dtypes[2], rounding, backend="triton")


@pytest.mark.pairs
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("dtypes", release_but(FLOAT32[:3], FLOAT32), ids=dtype_id)
@pytest.mark.parametrize("cfg", [False, True])
def test_values_are_those_of_the_cpu_kernel(cfg: bool, dtypes: tuple, rounding: str) -> None:
    """Bit for bit, noise included; only the order of sums differs."""
    table = TABLES["mixed"]
    case = make_case((4, 5, 29), table, dtypes, cfg=cfg, step=torch.tensor([1, 0, 2, 3]))

    def values(backend: str) -> list[torch.Tensor]:
        settings = {"rounding": rounding, "backend": backend}
        steps = [
            sample(case, table, out_dtype=dtypes[2], return_denoised=True, **given, **settings)
            for given in ({}, {"seed": 2**62 + 5})
        ]
        return [t for step in steps for t in (step.latents, step.denoised)] + [*score(case, table, **settings)[1:]]

    for mine, wanted in zip(values("triton"), values("cpu"), strict=True):
        assert mine.dtype == wanted.dtype and bits(mine) == bits(wanted)


@pytest.mark.parametrize("numel", release_but((3, BLOCK + 5), [1, 3, BLOCK - 1, BLOCK + 5]))
def test_noise_is_that_of_the_cpu_kernel(numel: int) -> None:
    ids = [0, 2**31, 2**32 + 7, 2**62]
    for seed, step in ((0, 0), (2**63 - 1, 7), (2**31, 3)):
        found = test_noise.draw(ids, numel, seed, step, "triton")
        assert bits(found) == bits(test_noise.draw(ids, numel, seed, step))
        assert_same_noise(found, test_noise.draw(ids, numel, seed, step, "reference"))


def test_noise_keys() -> None:
    test_noise.test_every_part_of_the_key_counts("triton")


@pytest.mark.release
def test_more_of_noise_keys() -> None:
    test_noise.test_keyed_by_seed_id_step_and_element_only("triton")
    test_noise.test_gaussian_noise("triton")
    test_noise.test_no_step_draws_the_noise_of_gaussian_noise(2**31, "triton")
    test_noise.test_seeded_step_equals_the_same_noise_given((F32, BF16, F32), "triton")


@cache
def of_runs(
    shape: tuple[int, ...], name: str, dtypes: tuple = (F32, F32, F32), cfg: bool = False, steps: tuple[int, ...] = ()
) -> tuple[Case, dict[str, torch.Tensor]]:
    """Contiguous tensors and all that comes of them."""
    case = make_case(shape, TABLES[name], dtypes, cfg=cfg, step=torch.tensor(steps) if steps else 1)
    return case, everything(case, TABLES[name], backend="triton")


# A layout of five dimensions that do not merge is one more than the kernel steps through.
LAYOUTS = test_transition.LAYOUTS | {
    "strided everywhere": lambda t: torch.nn.functional.pad(t, (0, 1) * (t.ndim - 1))[
        (slice(None), *(slice(0, n) for n in t.shape[1:]))
    ]
}


FOUR, SIX = (2, 4, 9, 70), (2, 2, 3, 2, 3, 17)
FEW = ((FOUR, "channels last"), (FOUR, "odd offset"), (FOUR, "trajectory"), (SIX, "strided everywhere"))
# Six dimensions have no channels last.
EVERY = [*((FOUR, layout) for layout in LAYOUTS), *((SIX, layout) for layout in LAYOUTS if layout != "channels last")]


@pytest.mark.parametrize("given", release_but(FEW, EVERY), ids=str)
def test_layout_does_not_matter(given: tuple[tuple[int, ...], str]) -> None:
    shape, layout = given
    dtypes = (F32, BF16, F32) if shape == FOUR else (BF16, F16, BF16)
    case, wanted = of_runs(shape, "mixed", dtypes, cfg=True, steps=(1, 0))
    assert_same_bits(everything(case.map(LAYOUTS[layout]), TABLES["mixed"], backend="triton"), wanted)


@pytest.mark.parametrize("changed", release_but(("output",), ["latents", "output", "next_latents", "noise"]))
def test_one_strided_operand_among_runs(changed: str) -> None:
    """Each operand has its own strides; the others stay on the fast path."""
    case, wanted = of_runs((2, 4, 9, 70), "flow")
    mixed = case.map(lambda t: LAYOUTS["channels last"](t) if t is getattr(case, changed) else t)
    assert not getattr(mixed, changed).is_contiguous()
    assert_same_bits(everything(mixed, TABLES["flow"], backend="triton"), wanted)


@pytest.mark.parametrize("dims", release_but(((0, 1, 2, 3),), [(0,), (3,), (1, 2, 3), (0, 1, 2, 3)]), ids=str)
def test_expanded_inputs(dims: tuple[int, ...]) -> None:
    table, shape = TABLES["flow"], (2, 4, 9, 17)
    kept = tuple(slice(0, 1) if d in dims else slice(None) for d in range(4))
    case = make_case(shape, table, (F32, BF16, F32), cfg=True).map(lambda t: t[kept].expand(shape))
    assert case.latents.stride(dims[0]) == 0
    contiguous = everything(case.map(torch.Tensor.contiguous), table, backend="triton")
    assert_same_bits(everything(case, table, backend="triton"), contiguous)


@pytest.mark.parametrize("out_dtype", release_but((BF16,), [F32, BF16, F16]))
@pytest.mark.parametrize(
    "layout",
    release_but(("crop", "odd offset"), ["slice", "crop", "trajectory", "transposed", "batch last", "odd offset"]),
)
def test_out_is_filled_and_nothing_around_it(layout: str, out_dtype: torch.dtype) -> None:
    test_transition.test_out_is_filled_and_nothing_around_it(layout, out_dtype, "triton")


def test_out_that_needs_a_copy() -> None:
    table = TABLES["flow"]
    case = make_case((2, 2, 3, 2, 3, 5), table)
    whole = torch.full([n + 2 for n in case.latents.shape], math.nan)
    out = whole[tuple(slice(1, -1) for _ in whole.shape)]
    sample(case, table, out=out, backend="triton")
    assert bits(out) == bits(sample(case, table, backend="triton").latents)
    out.fill_(math.nan)
    assert bool(whole.isnan().all())


@pytest.mark.parametrize("size", release_but((2,), [1, 2]))
def test_micro_batches(size: int) -> None:
    table = TABLES["flow"]
    case = make_case((4, 3, 401), table, (F32, BF16, BF16), cfg=True, step=torch.tensor([1, 2, 0, 3]))
    parts = [everything(case.select(slice(i, i + size)), table, backend="triton") for i in range(0, 4, size)]
    assert_same_bits(test_invariance.joined(parts), everything(case, table, backend="triton"))


@pytest.mark.release
def test_position_in_the_batch() -> None:
    table = TABLES["dance"]
    case = make_case((4, BLOCK + 31), table, (F32, BF16, F32), step=torch.tensor([1, 2, 0, 3]))
    order = [2, 0, 3, 1]
    whole = everything(case, table, backend="triton")
    found = everything(case.select(order), table, backend="triton")
    assert_same_bits(found, {name: value[order] for name, value in whole.items()})


def test_order_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program is the last adds up the same numbers."""
    from triton.runtime.interpreter import interpreter_builder as builder

    table = TABLES["flow"]
    case = make_case((2, 2 * BLOCK + 7), table, (F32, BF16, F32))
    wanted = everything(case, table, backend="triton")
    place = builder.set_grid_idx
    for shuffle in (lambda x: 5 - x, lambda x: (x * 5 + 2) % 6):
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z, shuffle=shuffle: place(shuffle(x), y, z))
        assert_same_bits(everything(case, table, backend="triton"), wanted)


def test_huge_samples_use_wide_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES["flow"]
    case = make_case((2, 4, 9, 130), table, cfg=True)
    strided = case.map(test_transition.as_crop)
    wanted = everything(case, table, backend="triton")
    monkeypatch.setattr(_triton, "needs_wide", lambda numel: True)
    assert_same_bits(everything(case, table, backend="triton"), wanted)
    assert_same_bits(everything(strided, table, backend="triton"), wanted)


def test_workspace_starts_dirty_and_tickets_end_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES["flow"]
    case = make_case((3, BLOCK + 1), table)
    wanted = everything(case, table, backend="triton")
    used = []

    def workspace(device: torch.device, tickets: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not used:
            used.append((torch.zeros(64, dtype=torch.int32), torch.full((4096,), math.nan)))
        assert tickets <= 64 and room <= 4096
        return used[0]

    monkeypatch.setattr(_triton, "_workspace", workspace)
    for _ in range(2):
        assert_same_bits(everything(case, table, backend="triton"), wanted)
        assert not bool(used[0][0].any())


def test_steps_outside_the_table_are_poison() -> None:
    """A step on the device cannot be checked without a sync: its sample becomes NaN, nothing else is touched."""
    table = TABLES["flow"]
    case = make_case((4, 40), table, step=torch.tensor([1, 2, 0, 3]))
    bad = torch.tensor([1, 4, -1, 3])

    def run(step: torch.Tensor, **settings) -> tuple[torch.Tensor, ...]:
        leaf = case.output.clone().requires_grad_()
        stepped = transition_step(case.latents, case.output, table, step, backend="triton", **settings)
        scored = transition_log_prob(case.latents, leaf, case.next_latents, table, step, backend="triton")
        scored.sum().backward()
        return stepped.latents, stepped.log_prob, scored.detach(), leaf.grad

    for settings in ({"noise": case.noise}, {"seed": 1}):
        for found, wanted in zip(run(bad, **settings), run(case.step, **settings), strict=True):
            assert bool(found[1:3].isnan().all()) and torch.equal(found[[0, 3]], wanted[[0, 3]])


@pytest.mark.pairs
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("dtypes", release_but(FLOAT32[:2], FLOAT32[:5]), ids=dtype_id)
def test_first_ratio_is_exactly_one(dtypes: tuple, rounding: str, seeded: bool) -> None:
    test_invariance.test_first_ratio_is_exactly_one(dtypes, True, seeded, rounding, seeded, "triton")


@pytest.mark.parametrize("dtype", release_but((BF16,), [F32, BF16, F16]))
@pytest.mark.parametrize("cfg", [False, True])
def test_samples_without_gradient_are_not_read(cfg: bool, dtype: torch.dtype) -> None:
    test_policy_loss_edges.test_samples_without_gradient_are_not_read(cfg, dtype, "triton")


def test_noise_of_a_deterministic_row_is_not_read() -> None:
    case = make_case((2, 50), TABLES["ode"])
    wanted = sample(case, TABLES["ode"], backend="triton")
    case.noise.fill_(math.nan)
    found = sample(case, TABLES["ode"], backend="triton")
    assert bits(found.latents) == bits(wanted.latents) and bool((found.log_prob == 0).all())


def test_version_counter_sees_the_write() -> None:
    case, out = make_case((2, 30), TABLES["flow"]), torch.zeros(2, 30)
    before = out._version
    sample(case, TABLES["flow"], out=out, backend="triton")
    assert out._version > before


def surrounded(value: torch.Tensor) -> torch.Tensor:
    """A copy between guard bands of NaN, 16-byte aligned."""
    band = 2 * BLOCK
    whole = torch.full((value.numel() + 2 * band,), math.nan, dtype=value.dtype)
    view = whole[band : band + value.numel()].view(value.shape)
    return view.copy_(value)


@pytest.mark.parametrize("numel", release_but((BLOCK + 17,), [1, 100, BLOCK, BLOCK + 17]))
@pytest.mark.parametrize(
    "dtypes", release_but(((BF16, F16, BF16),), [(F32, BF16, F32), (BF16, F16, BF16)]), ids=dtype_id
)
def test_inputs_are_not_read_around(dtypes: tuple, numel: int) -> None:
    """The interpreter lets an access outside pass: one would bring in NaN."""
    table = TABLES["flow"]
    case = make_case((2, numel), table, dtypes, cfg=True)
    guarded = case.map(surrounded)
    assert_same_bits(everything(guarded, table, backend="triton"), everything(case, table, backend="triton"))
