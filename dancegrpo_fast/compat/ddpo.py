"""DDPO's step (kvablack/ddpo-pytorch, `ddpo_pytorch/diffusers_patch/ddim_with_logprob.py`; DanceGRPO's SD script).

>>> import torch
>>> from diffusers import DDIMScheduler
>>> from dancegrpo_fast.compat.ddpo import ddim_step_with_logprob
>>> scheduler = DDIMScheduler(clip_sample=False)
>>> scheduler.set_timesteps(10)
>>> sample, output, time = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), scheduler.timesteps[3]
>>> after, log_prob = ddim_step_with_logprob(scheduler, output, time, sample, eta=1.0)
>>> bool((ddim_step_with_logprob(scheduler, output, time, sample, 1.0, prev_sample=after)[1] == log_prob).all())
True
"""

from typing import Any

import torch
from torch import Tensor

from .. import transitions
from ..checks import check_choice
from ..kernels.transition import reference
from ._common import How, Sampler, advance, as_step, cached, noise_like


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Any = None,
    prev_sample: Tensor | None = None,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step, or the score of `prev_sample`.

    Args:
        self: a diffusers `DDIMScheduler` after `set_timesteps`, without clipping or thresholding.
        model_output: `[B, ...]`; the log-probability is differentiable in it alone.
        timestep: training timestep, an int or an int64 tensor `[B]`. A step that would land below 0 lands on 0.
        sample: `[B, ...]`, any float dtype.
        eta: 0 is deterministic and scores 0, 1 is DDPM's noise.
        use_clipped_model_output: changes nothing where nothing is clipped.
        generator: what to draw the noise from, with diffusers' `randn_tensor`, in the model output's dtype.
        prev_sample: the next sample to score.
        rounding: "exact" scores the next sample as it is returned; "reference" scores it before it is rounded to the
            dtype of `sample`, as published, so its first ratio is not 1 in half precision.
        backend: as for `transition_step`.
        latents_dtype: as for `dancegrpo.flux_step`.

    Returns:
        `(prev_sample, log_prob)`: in the dtype of `sample`, and float32 `[B]`.

    Raises:
        ValueError: both `prev_sample` and `generator`, a scheduler whose step is not affine, or bad input.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: got one together with prev_sample, want one of them")
    check_choice("rounding", rounding, ("exact", "reference"))
    sampler = _sampler(self, eta)
    wide = reference.compute_dtype(sample, model_output)
    found = advance(
        sample,
        model_output,
        sampler,
        as_step("timestep", timestep, len(sampler.table), sample),
        prev_sample,
        lambda: noise_like(model_output, generator, model_output.dtype),
        # The published products are float32 already: alphas are tensors with dimensions.
        How("exact", backend, latents_dtype),
        out_dtype=wide if rounding == "reference" else sample.dtype,
    )
    return found.next_latents.to(sample.dtype), found.log_prob


def _sampler(scheduler: Any, eta: float) -> Sampler:
    """A row for every training timestep, so that a timestep is its own index."""
    if "DDIMScheduler" not in {base.__name__ for base in type(scheduler).__mro__}:
        raise ValueError(f"self: got {type(scheduler).__name__}, want a diffusers DDIMScheduler")
    if scheduler.num_inference_steps is None:
        raise ValueError("self: got a scheduler without timesteps, call set_timesteps first")
    config = scheduler.config
    for name in ("clip_sample", "thresholding"):
        if config.get(name):
            raise ValueError(f"self: got a scheduler with {name}=True, which is not affine; want it off")
    stride = config.num_train_timesteps // scheduler.num_inference_steps
    kind = config.prediction_type

    def build(alphas: Tensor) -> Sampler:
        times = torch.arange(len(alphas))
        return Sampler(
            transitions.ddim(
                alphas,
                times,
                eta,
                kind,
                previous_timesteps=times - stride,
                # The published step clamps its target to timestep 0.
                final_alpha_cumprod=float(alphas[0]),
            )
        )

    return cached("self.alphas_cumprod", scheduler.alphas_cumprod, ("ddim", float(eta), kind, stride), build)
