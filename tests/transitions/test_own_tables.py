"""Tables of samplers that this package does not name, against diffusers' schedulers; tables and results in words."""

from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import PolicyMetrics, policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.transitions import TransitionTable, dance_sde, mixed, ode, shifted_sigmas

from ..tolerances import assert_same_sample

F64 = torch.float64
BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_own_table_is_diffusers_ddpm_step(prediction_type: str, variance_type: str) -> None:
    """Ancestral sampling, which this package does not name: the mean as published, and diffusers' own numbers."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type, clip_sample=False)
    scheduler.set_timesteps(8)
    t = scheduler.timesteps
    alpha = scheduler.alphas_cumprod.double()
    here, after = alpha[t], torch.cat([alpha[t[1:]], torch.ones(1, dtype=F64)])
    step_alpha = here / after
    signal, noise = here.sqrt(), (1 - here).sqrt()
    p, q = {
        "epsilon": (1 / signal, -noise / signal),
        "v_prediction": (signal, -noise),
        "sample": (torch.zeros_like(here), torch.ones_like(here)),
    }[prediction_type]
    by_clean, by_x = after.sqrt() * (1 - step_alpha) / (1 - here), step_alpha.sqrt() * (1 - after) / (1 - here)
    variance = 1 - step_alpha if variance_type == "fixed_large" else (1 - after) / (1 - here) * (1 - step_alpha)
    tau = torch.where(t > 0, variance.clamp(min=1e-20).sqrt(), 0.0)
    table = TransitionTable.from_coefficients(by_clean * p + by_x, by_clean * q, tau, p=p, q=q, times=t)
    assert len(table) == 8 and table.times.tolist() == t.tolist() and table.kind == ("gaussian",) * 8

    g = torch.Generator().manual_seed(0)
    x, v, eps = (torch.randn(2, 4, 8, 8, generator=g, dtype=F64) for _ in range(3))
    for i, time in enumerate(t):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: eps)
            wanted = scheduler.step(v, time, x)
        found = transition_step(x, v, table, i, noise=eps, return_denoised=True)
        # The scheduler computes its coefficients in float32.
        single = torch.float32
        for ours, theirs in ((found.latents, wanted.prev_sample), (found.denoised, wanted.pred_original_sample)):
            assert_same_sample(ours.to(single), theirs.to(single))


def test_own_table_is_diffusers_euler_ancestral_step() -> None:
    """A sampler in sigmas of noise added to data, whose last step adds none: `x0 = x - sigma v`."""
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(6)
    s, n = scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double()
    up = (n**2 * (s**2 - n**2) / s**2).sqrt()
    down = (n**2 - up**2).sqrt()
    table = TransitionTable.from_coefficients([1.0] * 6, down - s, up, p=1.0, q=-s, times=scheduler.timesteps)
    g = torch.Generator().manual_seed(0)
    x, v, eps = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    for i, time in enumerate(scheduler.timesteps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *a, **k: eps)
            wanted = scheduler.step(v, time, x)
        found = transition_step(x, v, table, i, noise=eps, return_denoised=True)
        assert_same_sample(found.latents, wanted.prev_sample)
        assert_same_sample(found.denoised, wanted.pred_original_sample)
        x = found.latents


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_table_scores_as_the_named_one(backend: str) -> None:
    sigmas = shifted_sigmas(4, 3.0)
    named = dance_sde(sigmas, 0.3)
    own = TransitionTable.from_coefficients(
        named.a.float().tolist(), named.b.numpy(), named.tau, step_size=named.step_size, kind=["gaussian"] * 4
    )
    own = replace(own, a=named.a)
    assert own.times.tolist() == [0, 1, 2, 3] and own.has_step_size
    assert not own.has_denoised and not own.has_reference_rounding and named.has_denoised
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 5, 7, generator=g), torch.randn(2, 5, 7, generator=g)
    steps = [transition_step(x, v, table, 2, seed=1, backend=backend) for table in (named, own)]
    assert torch.equal(steps[0].latents, steps[1].latents) and torch.equal(steps[0].log_prob, steps[1].log_prob)
    score = transition_log_prob(x, v, steps[0].latents, own, 2, backend=backend)
    assert torch.equal(score, steps[0].log_prob)


def test_mixed_keeps_what_only_one_table_knows() -> None:
    sigmas = (1.0, 0.5, 0.0)
    own = TransitionTable.from_coefficients([1.0, 1.0], -0.5, 0.3, times=sigmas[:2])
    table = mixed(own, ode(sigmas), [1])
    assert not table.has_denoised and table.p.isnan().tolist() == [False, True]


def test_tables_and_results_in_one_line() -> None:
    assert repr(dance_sde((1.0, 0.5, 0.0), 0.3)) == "TransitionTable(2 rows, gaussian, noise 0.2121 to 0.2121)"
    assert repr(ode((1.0, 0.0))) == "TransitionTable(1 rows, none, no noise)"
    both = mixed(dance_sde((1.0, 0.5, 0.0), 0.3), ode((1.0, 0.5, 0.0)), [0])
    assert repr(both) == "TransitionTable(2 rows, gaussian, none, noise 0 to 0.2121)"
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    step = transition_step(x, x, both, 0, seed=1)
    assert repr(step) == "TransitionStep(latents=bfloat16[2, 3, 4], log_prob=float32[2], denoised=None)"
    moved = step._replace(latents=x.to("meta"))
    assert repr(moved) == "TransitionStep(latents=bfloat16[2, 3, 4] on meta, log_prob=float32[2], denoised=None)"
    loss = policy_loss(x, x, step.latents, both, 0, step.log_prob, torch.ones(2))
    named = "".join(f", {name}=float32[]" for name in PolicyMetrics._fields)[2:]
    assert repr(loss) == (
        f"PolicyLoss(loss=float32[], log_prob=float32[2], ratio=float32[2], metrics=PolicyMetrics({named}),"
        " has_grad=bool[2])"
    )
