"""Fixed prompts and noises, ODE and SDE samples, every score and the diversity that is left."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import EvaluationSettings, SamplerSettings
from .models import GeneratorModel
from .ops.noise import gaussian_noise
from .prompts import Prompt
from .rewards import RewardInput, RewardSet
from .rng import derive_seed
from .rollout import Policy, chunks, rollout


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, diversity, and the frames of the pictures `[prompts, samples, 3, H, W]`."""

    scores: dict[str, float]
    diversity: float
    grid: Tensor


def diversity(frames: Tensor, samples_per_prompt: int) -> float:
    """Standard deviation of each pixel over the samples of a prompt, averaged over pixels and prompts.

    Args:
        frames: `[P * samples_per_prompt, T, 3, H, W]`, samples of a prompt are neighbours.
        samples_per_prompt: at least 2.
    """
    grouped = frames.double().reshape(-1, samples_per_prompt, *frames.shape[1:])
    return float(grouped.std(dim=1, correction=0).mean())


def decode(model: GeneratorModel, latents: Tensor, rows: int) -> Tensor:
    """Frames of all samples, decoded in micro-batches: float32 `[B, T, 3, H, W]` on the CPU."""
    with torch.no_grad():
        return torch.cat([model.decode(latents[part]).cpu() for part in chunks(len(latents), rows)])


class Evaluator:
    """Samples the same noises at every call and scores them."""

    def __init__(
        self,
        settings: EvaluationSettings,
        sampler: SamplerSettings,
        prompts: Sequence[Prompt],
        model: GeneratorModel,
        seed: int,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._model = model
        self.prompts = prompts
        self._rewards = RewardSet(settings.rewards)
        self._seed = derive_seed(seed, "evaluation")
        self._dtype = sampler.torch_dtype()
        self._fps = sampler.fps
        self._ids = torch.arange(len(prompts) * settings.samples_per_prompt, device=device)
        self._tables = {"ode": model.table(sampler, deterministic=True), "sde": model.table(sampler)}

    def __call__(self, policy: Policy, sampler: str) -> Evaluation:
        """Evaluates with "ode" or "sde" samples."""
        settings = self._settings
        texts = [prompt.text for prompt in self.prompts]
        samples = settings.samples_per_prompt
        noise = gaussian_noise(
            self._model.latent_shape, seed=derive_seed(self._seed, "noise"), sample_ids=self._ids, dtype=self._dtype
        )
        trajectory = rollout(
            policy,
            self._tables[sampler],
            noise,
            samples,
            self._model.encode(self.prompts),
            seed=derive_seed(self._seed, "steps"),
            sample_ids=self._ids,
            shared_first_step=False,
        )
        frames = decode(self._model, trajectory.denoised, policy.rows)
        repeated = [prompt for prompt in self.prompts for _ in range(samples)]
        scores = self._rewards(
            RewardInput(
                frames=frames,
                prompts=[prompt.text for prompt in repeated],
                group=torch.arange(len(texts)).repeat_interleave(samples),
                meta=[prompt.meta for prompt in repeated],
                fps=self._fps,
            )
        )
        grouped = frames.reshape(len(texts), samples, *frames.shape[1:])
        return Evaluation(
            dict(zip(self._rewards.names, scores.mean(dim=1).tolist(), strict=True)),
            diversity(frames, samples),
            grouped[: settings.grid_prompts, : settings.grid_samples, 0],
        )
