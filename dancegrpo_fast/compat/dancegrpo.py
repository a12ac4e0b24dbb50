"""DanceGRPO's step (XueZeyue/DanceGRPO, `fastvideo/train_grpo_flux.py` and the other flow scripts)."""

from torch import Tensor

from ._grpo import dance_mean, dance_step


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    rounding: str = "exact",
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """One Dance-SDE step, or the score of `prev_sample`.

    Args:
        model_output: `[B, ...]`, the velocity, any float dtype; the log-probability is differentiable in it alone.
        latents: `[B, ...]`, float32 in the scripts.
        eta: noise level; 0 takes the Euler step and scores 0.
        sigmas: `[T + 1]`, strictly decreasing within [0, 1], on any device; read once.
        index: step, an int or an int64 tensor without dimensions on any device.
        prev_sample: next latents to score; None draws them from torch's default generator, as `randn_like`.
        grpo: False gives the mean without noise or score.
        sde_solver: False leaves the score term out of the mean; the noise stays.
        rounding: "exact", or "reference" for products rounded to the model output's dtype.
        backend: as for `transition_step`.

    Returns:
        `(prev_sample, x0, log_prob)`, or `(mean, x0)` where `grpo` is False. `log_prob` is float32 `[B]`, without
        the Gaussian's constants, which the published script computes and drops. `prev_sample` has no gradient.

    Raises:
        ValueError: bad input, by argument.
    """
    if not grpo:
        return dance_mean(model_output, latents, eta, sigmas, index, sde_solver, rounding)
    return dance_step(
        model_output,
        latents,
        eta,
        sigmas,
        index,
        prev_sample,
        sde_solver,
        normalized=False,
        noisy_ode=True,
        with_mean=False,
        rounding=rounding,
        backend=backend,
    )[:3]
