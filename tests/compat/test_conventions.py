"""Golden values through the shims, and each peer's own conventions: indices, schedules, windows, refusals."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dancegrpo_fast import transitions
from dancegrpo_fast.compat import _common, dancegrpo, ddpo, flow_factory, flow_grpo, mixgrpo, pref_grpo, verl_omni
from dancegrpo_fast.compat._schedule import _found_on_device, find_steps

from ..tolerances import assert_as_printed, assert_same_formula, assert_within_budget
from ..transitions.test_transitions import GOLDEN, golden_inputs
from .cases import BF16, F32, F64, PEERS, SIGMAS, TIMES, ddim_scheduler, draw, flow_scheduler, ours, seeded


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("cps")])
def test_golden_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, (_, _, tau, first, second, mean) = GOLDEN[name]
    x, v, eps = golden_inputs()
    sigmas = torch.stack([table.times[0], table.times[0] - table.step_size[0]])
    if name.startswith("flow"):
        monkeypatch.setattr("dancegrpo_fast.compat._grpo.noise_like", lambda *_: eps)
        found = pref_grpo.flow_grpo_step(v, x, 0.7, sigmas, 0, None, None, True)
    else:
        monkeypatch.setattr("dancegrpo_fast.compat._grpo.noise_like_sum", lambda *_: eps)
        found = pref_grpo.dance_grpo_step(v, x, 0.3, sigmas, 0, None, True, True, True)
        short = dancegrpo.flux_step(v, x, 0.3, sigmas, 0, None, True, True, normalized=False)
        assert_same_formula(short[2], -eps.square().mean(dim=1) / 2)
    assert_as_printed(found[2][0], first)
    assert_as_printed(found[2][1], second)
    assert_as_printed(found[3][0, 0], mean)
    assert found[4] == torch.tensor(float(tau))  # float32, as printed


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)])
@pytest.mark.parametrize("step", [dancegrpo.flux_step, mixgrpo.dance_grpo_step, pref_grpo.dance_grpo_step])
def test_an_index_may_be_a_tensor(step: Callable, index: Tensor) -> None:
    v, x, after = draw(BF16, 1), draw(F32, 2), draw(F32, 3)
    for want, got in zip(*(step(v, x, 0.3, SIGMAS, i, after, True, True) for i in (1, index)), strict=True):
        assert torch.equal(want, got)
    flow = mixgrpo.flow_grpo_step
    for want, got in zip(*(flow(v, x, 0.3, SIGMAS, i, after) for i in (1, index)), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("given", [True, False])
def test_nothing_asks_a_device_for_the_value_of_an_index(given: bool, rounding: str) -> None:
    settings = {"rounding": rounding, "latents_dtype": BF16}
    scheduler, sigmas = ddim_scheduler(), SIGMAS.clone()
    for device in ("cpu", "meta"):  # a meta tensor has no value, as one on a GPU has none without waiting
        v = torch.ones(2, 3, dtype=BF16, requires_grad=True, device=device)
        x, after = torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)
        after = after if given else None
        at = torch.ones((), dtype=torch.int64, device=device)
        found = [dancegrpo.flux_step(v, x, 0.3, sigmas, at, after, True, True, **settings)]
        found += [mixgrpo.dance_grpo_step(v, x, 0.3, sigmas, at, after, True, False, **settings)]
        found += [pref_grpo.dance_grpo_step(v, x, 0.3, sigmas, at, after, True, True, True, **settings)]
        found += [mixgrpo.flow_grpo_step(v, x, 0.7, sigmas, at, after, None, True, **settings)]
        found += [pref_grpo.flow_grpo_step(v, x, 0.7, sigmas, at, after, None, True, **settings)]
        found += [ddpo.ddim_step_with_logprob(scheduler, v, at, x, 1.0, prev_sample=after, **settings)]
        assert [len(f) for f in found] == [3, 3, 6, 5, 6, 2]
        times = TIMES[1:2].to(device)
        found += [flow_grpo.sde_step_with_logprob(FLOW, v, times, x, prev_sample=after, **settings)]
        found += [flow_grpo.wan_sde_step_with_logprob(FLOW, v, times, x, after, determistic=True, **settings)]
        found += [flow_factory.step(FLOW, v, times, x, after, TIMES[2:3].to(device), return_dict=False, **settings)]
        assert {t.device.type for f in found for t in f} == {device}
        with pytest.raises(ValueError, match="index: got 4, want an int from 0 to 3"):
            dancegrpo.flux_step(v, x, 0.3, sigmas, torch.tensor(4), None, True, True)


@pytest.mark.parametrize("sde_solver", [True, False])
@pytest.mark.parametrize("module", ["dancegrpo", "mixgrpo", "pref_grpo"])
def test_without_grpo(module: str, sde_solver: bool) -> None:
    name = "flux_step" if module == "dancegrpo" else "dance_grpo_step"
    step, peer = getattr(ours(module), name), getattr(PEERS[module], name)
    v, x = draw(F32, 1), draw(F32, 2)
    state = torch.get_rng_state()
    found = step(v, x, 0.3, SIGMAS, 1, None, False, sde_solver)
    assert torch.equal(torch.get_rng_state(), state)
    truth = peer(v.double(), x.double(), 0.3, SIGMAS.double(), 1, None, False, sde_solver)
    for got, exact, plain in zip(found, truth, peer(v, x, 0.3, SIGMAS, 1, None, False, sde_solver), strict=True):
        assert_within_budget(got, exact, plain)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Schedules for which a Dance table was built."""
    calls: list[Tensor] = []
    monkeypatch.setattr(_common, "_by_numbers", {})
    original = transitions.dance_sde
    monkeypatch.setattr(transitions, "dance_sde", lambda s, eta: calls.append(s.clone()) or original(s, eta))
    return calls


def flux(sigmas: Tensor, eta: float = 0.3) -> Tensor:
    return dancegrpo.flux_step(draw(F32, 1), draw(F32, 2), eta, sigmas, 1, draw(F32, 3), True, True)[2]


def test_a_table_is_built_once_and_again_after_a_change(built: list[Tensor]) -> None:
    sigmas = SIGMAS.clone()
    first = flux(sigmas)
    assert torch.equal(flux(sigmas), first) and len(built) == 1
    sigmas[1:-1] *= 0.9
    changed = flux(sigmas)
    assert len(built) == 2 and torch.equal(built[1], sigmas) and not torch.equal(changed, first)
    assert torch.equal(changed, flux(sigmas.clone()))
    with torch.inference_mode():
        without_version = SIGMAS.clone()
        assert torch.equal(flux(without_version), first)
    assert len(built) == 2  # tensors of the same numbers share one table
    assert not torch.equal(flux(sigmas.clone(), 0.2), changed) and len(built) == 3
    with pytest.raises(ValueError, match="sigmas: "):
        flux(sigmas.expand(2, -1))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
def test_a_schedule_that_is_overwritten_changes_no_other_of_its_numbers(
    rounding: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "_by_numbers", {})
    v, x = draw(F32, 1), draw(F32, 2)

    def step(sigmas: Tensor) -> tuple[Tensor, ...]:
        return dancegrpo.flux_step(v, x, 0.3, sigmas, 1, x, True, True, rounding=rounding)

    first = SIGMAS.to(dtype) * 0.95
    wanted = step(first)
    first *= 0.5
    assert all(map(torch.equal, step(SIGMAS.to(dtype) * 0.95), wanted))


def test_tables_do_not_outlive_their_schedule() -> None:
    before = len(_common._samplers)
    for _ in range(3):
        flux(SIGMAS.clone())
    assert len(_common._samplers) == before
    kept = [SIGMAS.clone() for _ in range(2 * _common._MAX_SCHEDULES)]
    for sigmas in kept:
        flux(sigmas)
    assert len(_common._samplers) <= _common._MAX_SCHEDULES
    for eta in range(2 * _common._MAX_SAMPLERS):
        flux(kept[-1], 0.1 + eta / 100)
    assert len(_common._samplers[kept[-1]][1]) <= _common._MAX_SAMPLERS
    for scale in range(2 * _common._MAX_SCHEDULES):
        flux(SIGMAS * (1 - scale / 1000))
    assert len(_common._by_numbers) <= _common._MAX_SCHEDULES


def test_sampling_with_gradients_enabled_scores_with_them() -> None:
    v = draw(F32, 1).requires_grad_()
    after, clean, log_prob = dancegrpo.flux_step(v, draw(F32, 2), 0.3, SIGMAS, 1, None, True, True)
    assert log_prob.requires_grad and clean.requires_grad and not after.requires_grad


@pytest.mark.parametrize("rounding", ["exact", "reference"])
def test_a_rollout_in_inference_mode_can_be_trained_on(rounding: str) -> None:
    v, x, sigmas, scheduler = draw(F32, 1), draw(F32, 2), SIGMAS.clone(), flow_scheduler(sigmas=SIGMAS.clone())
    steps: dict[str, Callable[[Tensor, Tensor | None], tuple]] = {
        "flux": lambda v, after: dancegrpo.flux_step(v, x, 0.3, sigmas, 1, after, True, True, rounding=rounding),
        "mix": lambda v, after: mixgrpo.flow_grpo_step(v, x, 0.7, sigmas, 1, after, rounding=rounding),
        "flow": lambda v, after: flow_grpo.sde_step_with_logprob(
            scheduler, v, TIMES[[0, 1] * 4], x, prev_sample=after, rounding=rounding
        ),
    }
    for name, step in steps.items():
        score = 1 if name == "flow" else 2
        with torch.inference_mode(), torch.device("meta"):  # a default device is not where tables belong
            found = step(v, None)
        output = v.clone().requires_grad_()
        again = step(output, found[0].clone())[score]
        assert torch.equal(torch.exp(again - found[score].clone()), torch.ones(len(x)))
        again.sum().backward()
        assert output.grad is not None and bool(output.grad.any())


def test_a_table_that_was_first_used_in_inference_mode_can_be_trained_with() -> None:
    table = transitions.dance_sde(SIGMAS, 0.3)
    with torch.inference_mode():
        table.packed("meta")
    assert not table.packed("meta").is_inference()


def test_generators_move_on_as_the_peer_s() -> None:
    v, x = draw(BF16, 1), draw(F32, 2)
    for determistic in (False, True):
        states = []
        for module in (mixgrpo, PEERS["mixgrpo"]):
            generator = torch.Generator().manual_seed(5)
            module.flow_grpo_step(v, x, 0.7, SIGMAS, 1, None, generator, determistic)
            states.append(generator.get_state())
        assert torch.equal(*states)


def test_ddpo_lands_on_timestep_0_and_rounds_before_it_scores() -> None:
    v, x, scheduler = draw(BF16, 1), draw(BF16, 2), ddim_scheduler()
    times = torch.full((len(x),), 301)
    step = ddpo.ddim_step_with_logprob
    after, log_prob = step(scheduler, v, times, x, 1.0, generator=torch.Generator().manual_seed(0))
    assert after.dtype == BF16
    assert torch.equal(step(scheduler, v, times, x, 1.0, prev_sample=after)[1], log_prob)
    peer = PEERS["ddpo"].ddim_step_with_logprob
    plain = peer(scheduler, v, times, x, 1.0, generator=torch.Generator().manual_seed(0))
    found = step(scheduler, v, times, x, 1.0, generator=torch.Generator().manual_seed(0), rounding="reference")
    again = step(scheduler, v, times, x, 1.0, prev_sample=found[0], rounding="reference")[1]
    assert torch.equal(found[0], plain[0]) and not torch.equal(again, found[1])
    for time in (50, 1):
        last = torch.full((len(x),), time)
        exact = peer(ddim_scheduler(F64), v.double(), last, x.double(), 1.0, prev_sample=after.double())
        plain = peer(scheduler, v.float(), last, x, 1.0, prev_sample=after)
        assert_within_budget(step(scheduler, v, last, x, 1.0, prev_sample=after)[1], exact[1], plain[1])
    still = step(scheduler, v.float(), 0, x.float(), 1.0)  # from 0 to 0: nothing moves
    assert torch.equal(still[0], x.float()) and not still[1].any()


def test_verl_omni_s_loop() -> None:
    scheduler = verl_omni.FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    torch.manual_seed(0)
    x = draw(F32, 2)
    for i, t in enumerate(scheduler.timesteps):
        v = draw(BF16, i).float()
        before = torch.get_rng_state()
        out = scheduler.step(v, t, x, sde_type="dance_sde", return_logprobs=i % 2 == 0)
        torch.set_rng_state(before)
        wanted = scheduler.sample_previous_step(x, v, t[None], sde_type="dance_sde", return_sqrt_dt=True)
        assert torch.equal(out.prev_sample, wanted[0]) and torch.equal(out.prev_sample_mean, wanted[2])
        assert out.std_dev_t.ndim == 0 and wanted[3].shape == (1, 1, 1, 1) and wanted[4].shape == (1,)
        assert out.log_prob is None if i % 2 else torch.equal(out.log_prob, wanted[1])
        x = out.prev_sample
    assert scheduler.step_index == 4


def test_flow_factory_s_window_timesteps_and_fields() -> None:
    scheduler = flow_factory.FlowMatchEulerDiscreteSDEScheduler(shift=3.0, num_sde_steps=1, seed=3)
    scheduler.set_timesteps(4)
    v, x, times = draw(F32, 1), draw(F32, 2), scheduler.timesteps
    window = scheduler.current_sde_steps.tolist()
    assert len(window) == 1 and window[0] < 3
    for i, t in enumerate(times):
        out = seeded(0, scheduler.step, v, t, x)
        drawn = torch.get_rng_state()
        seeded(0, torch.randn, x.shape)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert bool(out.std_dev_t.any()) == bool(out.log_prob.any()) == (i in window)
        after = times[i + 1] if i < 3 else torch.tensor(0.0)
        for same in ({"timestep": float(t)}, {"timestep": i}, {"timestep": t, "timestep_next": after}):
            again = seeded(0, scheduler.step, v, same.pop("timestep"), x, **same)
            assert torch.equal(again.next_latents, out.next_latents)
        only = scheduler.step(v, t, x, compute_log_prob=False, return_kwargs=["log_prob", "dt"])
        assert only.log_prob is None and only.next_latents is None and only.dt.shape == (len(x), 1, 1, 1)
    scheduler.eval()
    assert not scheduler.step(v, times[0], x).std_dev_t.any()
    scheduler.train()
    levels = torch.full((len(x),), 0.5), 0.5
    assert torch.equal(*(seeded(0, scheduler.step, v, times[1], x, noise_level=at).next_latents for at in levels))


def test_of_a_timestep_that_is_there_twice_the_second_is_taken_as_in_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps = torch.tensor([999, 999, 750, 500, 500, 250])  # as UniPC's integers are in long schedules
    for time in (999, 750, 500, 250):
        want = scheduler.index_for_timestep(torch.tensor(time))
        for given in (torch.tensor([time]), torch.tensor([time] * 3), torch.tensor(float(time)), time):
            assert find_steps(scheduler, given, torch.device("cpu"))[0] == want
        wanted = torch.tensor([time, 750])
        on_device = _found_on_device(scheduler.timesteps, wanted, True, torch.device("cpu"))
        assert on_device.tolist() == [want, 2]
    mixed, count = find_steps(scheduler, torch.tensor([750, 250]), torch.device("cpu"))
    assert mixed.tolist() == [2, 5] and count == 2


V, X = draw(F32, 1), draw(F32, 2)
FLOW = flow_scheduler()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dancegrpo.flux_step(V, X, 0.3, [1.0, 0.0], 0, None, True, True), "sigmas: got list, want a torch.T"),
        (lambda: dancegrpo.flux_step(V, X, 0.3, SIGMAS.flip(0), 0, None, True, True), "sigmas: got .* decreasing"),
        (lambda: dancegrpo.flux_step(V, X, -0.3, SIGMAS, 0, None, True, True), "eta: got -0.3, want"),
        (lambda: dancegrpo.flux_step(V, X, 0.3, SIGMAS, 4, None, True, True), "index: got 4, want an int from 0 to 3"),
        (lambda: dancegrpo.flux_step(V, X, 0.3, SIGMAS, 0, None, True, True, rounding="no"), 'rounding: got "no"'),
        (lambda: dancegrpo.flux_step(V, X, 0.3, SIGMAS, 0, None, False, True, rounding="no"), 'rounding: got "no"'),
        (lambda: mixgrpo.flow_grpo_step(V, X, 0.3, SIGMAS, 0, X, torch.Generator()), "generator: got one together"),
        (lambda: ddpo.ddim_step_with_logprob(FLOW, V, 1, X), "self: got SimpleNamespace, want a diffusers DDIM"),
        (lambda: ddpo.ddim_step_with_logprob(ddim_scheduler(thresholding=True), V, 1, X), "self: .* thresholding=True"),
        (lambda: ddpo.ddim_step_with_logprob(ddim_scheduler(), V, 1, X, rounding="no"), 'rounding: got "no"'),
        (lambda: flow_grpo.sde_step_with_logprob(FLOW, V, TIMES[:1], X, sde_type="x"), 'sde_type: got "x", want "sde"'),
        (lambda: flow_grpo.sde_step_with_logprob(FLOW, V, TIMES[:1] + 1, X), "timestep: got .*, want some of the"),
        (lambda: verl_step(sde_type="x"), 'sde_type: got "x", want "sde", "cps" or "dance_sde"'),
        (lambda: verl_step(per_token_timesteps=X), "per_token_timesteps: got a value, want None"),
        (lambda: verl_step(model_output=V.bfloat16()), "model_output: got torch.bfloat16, want torch.float32"),
        (
            lambda: mixgrpo.flow_grpo_step(V, X, 0.3, SIGMAS, 0, None, latents_dtype=torch.int32),
            "latents_dtype: got torch.int32, want",
        ),
        (
            lambda: flow_grpo.wan_sde_step_with_logprob(FLOW, V, TIMES[:1], X, X, torch.Generator()),
            "generator: got one together",
        ),
        (lambda: factory_step(state="x"), 'state: got "x", want "newest", "2026-03-21"'),
        (lambda: factory_step(dynamics_type="x"), 'dynamics_type: got "x", want "Flow-SDE", "Dance'),
        (lambda: factory_step(timestep_next=TIMES[2]), "timestep_next: got .*, want what follows"),
        (lambda: factory_step(noise_level=torch.arange(8) / 10), "noise_level: got .*, want one level"),
        (lambda: factory_step(noise_level=torch.ones(8, device="meta")), "noise_level: got a tensor on meta"),
        (lambda: factory_step(sigma_max=1.0), "sigma_max: got 1.0, want a number from 0 to below 1"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def verl_step(**settings) -> object:
    given = {"sample": X, "model_output": V, "timestep": TIMES[:1]} | settings
    return verl_omni.FlowMatchSDEDiscreteScheduler.sample_previous_step(FLOW, **given)


def factory_step(**settings) -> object:
    return flow_factory.FlowMatchEulerDiscreteSDEScheduler.step(FLOW, V, TIMES[:1], X, **settings)
