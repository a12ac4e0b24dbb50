"""The loop of the published training scripts in plain torch: one sample, one step, one file at a time.

It keeps what their users pay for: batch 1 in rollout, decode, reward and replay, a host read and a reduction per
micro-step, pictures written to files and read back to be scored, nothing shared between the samples of a prompt. Noise,
prompts and timesteps are those of our trainer, and so are model, reward, loss and optimiser.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from bench.peers import flux_step
from dancegrpo_fast.models import GeneratorModel
from dancegrpo_fast.ops.noise import gaussian_noise
from dancegrpo_fast.ops.transition import transition_step
from dancegrpo_fast.prompts import Prompt, prompts_of_iteration
from dancegrpo_fast.recipe import Recipe
from dancegrpo_fast.rewards import RewardInput, RewardSet
from dancegrpo_fast.rng import derive_seed, generator
from dancegrpo_fast.transitions import LogProbKind, TransitionTable


class PlainLoop:
    """One-process GRPO as the scripts write it.

    Args:
        recipe: with one update a rollout; the sampler's kind is "dance_sde" or "ddim".
        model: with its denoiser.
        prompts: of the run.
        folder: for pictures.
        rows: samples of a model call, all of one prompt; 1 is what the scripts do. With more, nothing is read or
            reduced per step either: the same mathematics in plain torch, batched.
    """

    def __init__(
        self, recipe: Recipe, model: GeneratorModel, prompts: Sequence[Prompt], folder: Path, rows: int = 1
    ) -> None:
        if recipe.train.updates_per_rollout != 1 or recipe.train.best_of_n is not None:
            raise ValueError("recipe: got several updates a rollout or best-of-N, want one update of all samples")
        self.recipe, self.model, self.prompts, self.folder, self.rows = recipe, model, prompts, folder, rows
        self.denoiser: nn.Module = model.denoiser
        self.rewards = RewardSet(recipe.rewards)
        self.table = model.table(recipe.sampler)
        self.trainable = [t for t in range(len(self.table) - 1) if self.table.tau[t] > 0]
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        train = recipe.train
        self.optimizer = torch.optim.AdamW(self.parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
        self.unconditional = model.unconditional(recipe.sampler.guidance_scale)
        ends = self.table.times[-1:] - self.table.step_size[-1:]
        self.sigmas = torch.cat([self.table.times, ends]).float()
        zeros, ones = (
            torch.zeros(len(self.table), dtype=torch.float64),
            torch.ones(len(self.table), dtype=torch.float64),
        )
        kinds: list[LogProbKind] = ["none"] * len(self.table)
        # The stream of `transition_step`, so that the samples are the trainer's.
        self.noise = TransitionTable(zeros, zeros, ones, zeros, zeros, kinds, *(zeros,) * 5)

    def predict(self, latents: Tensor, steps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Guided outputs at latents `[n, ...]` and their steps `[n]`."""
        times, scale = self.table.times.float()[steps], self.recipe.sampler.guidance_scale
        output, uncond = self.model.predict(self.denoiser, latents, times, conditioning, self.unconditional, scale)
        return output if uncond is None else uncond + scale * (output - uncond)

    def transition(
        self, output: Tensor, latents: Tensor, step: int, following: Tensor | None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next latents, the estimate of x0 and the log-probability `[n]`, all samples at one step."""
        if self.recipe.sampler.kind == "dance_sde":
            return flux_step(output, latents, self.recipe.sampler.eta, self.sigmas, step, following, noise)
        a, b, tau, p, q = (float(getattr(self.table, name)[step]) for name in ("a", "b", "tau", "p", "q"))
        mean, denoised = a * latents + b * output, p * latents + q * output
        if following is None:
            following = mean + tau * noise if noise is not None else mean
        if tau == 0:
            return following, denoised, mean.new_zeros(len(mean))
        log_prob = -((following.detach() - mean) ** 2) / (2 * tau**2) - math.log(tau) - math.log(math.sqrt(2 * math.pi))
        return following, denoised, log_prob.flatten(1).mean(dim=1)

    @torch.no_grad()
    def sample(self, ids: Tensor, starts: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
        """Latents `[n, T + 1, ...]`, log-probabilities `[n, T]` and what is decoded of samples of one prompt."""
        seed, conditioning = self.recipe.seed, repeated(self.model.encode([prompt]), len(ids))
        shape = self.model.latent_shape
        latents = [gaussian_noise(shape, seed=derive_seed(seed, "initial latents"), sample_ids=starts)]
        log_probs = []
        for step in range(len(self.table)):
            noise = self.step_noise(latents[0], step, ids)
            output = self.predict(latents[-1], torch.full((len(ids),), step), conditioning)
            following, denoised, log_prob = self.transition(output, latents[-1], step, None, noise)
            latents.append(following)
            log_probs.append(log_prob)
        decoded = denoised if self.model.decodes_x0 else following
        return torch.stack(latents, dim=1), torch.stack(log_probs, dim=1), decoded

    def step_noise(self, like: Tensor, step: int, ids: Tensor) -> Tensor:
        """Standard normals of one step."""
        zeros = torch.zeros(()).expand(like.shape)
        seed = derive_seed(self.recipe.seed, "steps")
        return transition_step(zeros, zeros, self.noise, step, seed=seed, sample_ids=ids).latents

    @torch.no_grad()
    def score(self, denoised: Tensor, prompt: Prompt, number: int) -> Tensor:
        """Rewards `[K, n]` of pictures that went through files."""
        frames = self.model.decode(denoised)
        read = []
        for place, picture in enumerate(frames.flatten(0, 1)):
            path = self.folder / f"{number * frames.shape[1] + place}.png"
            Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
            read.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255)
        texts, meta = [prompt.text] * len(frames), [prompt.meta] * len(frames)
        groups = torch.zeros(len(frames), dtype=torch.int64)
        fps = self.recipe.sampler.fps
        return self.rewards(RewardInput(torch.stack(read).unflatten(0, frames.shape[:2]), texts, groups, meta, fps))

    def iteration(self, iteration: int) -> float:
        """One rollout and its update; returns the mean of the first reward."""
        train, seed = self.recipe.train, self.recipe.seed
        prompts = prompts_of_iteration(self.prompts, train.prompts_per_iteration, iteration - 1, seed)
        group, batch = train.group_size, train.prompts_per_iteration * train.group_size
        first = (iteration - 1) * batch
        latents, log_probs, rewards = [], [], []
        for start in range(0, batch, self.rows):
            # With several rows a call, it is still one prompt's.
            ids = torch.arange(start, start + self.rows) + first
            prompt = prompts[start // group]
            shared = self.recipe.sampler.shared_noise
            begin = ids - (ids - first) % group if shared else ids
            x, log_prob, denoised = self.sample(ids, begin, prompt)
            latents.append(x)
            log_probs.append(log_prob)
            rewards.append(self.score(denoised, prompt, start))
            if self.rows == 1:
                dist.barrier()
        scores = torch.cat(rewards, dim=1)
        grouped = scores.reshape(len(scores), -1, group)
        normalised = (grouped - grouped.mean(dim=2, keepdim=True)) / (grouped.std(dim=2, keepdim=True) + 1e-8)
        normalised = normalised.clamp(-train.advantage_clip, train.advantage_clip)
        weights = torch.tensor(self.rewards.weights)[:, None, None]
        advantages = (normalised * weights).sum(dim=0).flatten()
        self.update(prompts, torch.cat(latents), torch.cat(log_probs), advantages, first)
        return float(scores[0].mean())

    def update(
        self, prompts: Sequence[Prompt], latents: Tensor, log_probs: Tensor, advantages: Tensor, first: int
    ) -> None:
        """One optimiser step on all samples and their timesteps."""
        train, batch = self.recipe.train, len(latents)
        count = int(train.timestep_fraction * len(self.trainable) + 1e-9)
        chosen = []
        for sample in range(first, first + batch):
            order = torch.randperm(len(self.trainable), generator=generator(self.recipe.seed, "timesteps", sample))
            chosen.append([self.trainable[i] for i in order[:count].tolist()])
        steps = torch.tensor(chosen)
        self.losses: list[float] = []
        for start in range(0, batch, self.rows):
            part = slice(start, start + self.rows)
            prompt = prompts[start // train.group_size]
            conditioning = repeated(self.model.encode([prompt]), self.rows)
            for turn in range(count):
                at = steps[part, turn]
                rows = torch.arange(start, start + len(at))
                x, following = latents[rows, at], latents[rows, at + 1]
                output = self.predict(x, at, conditioning)
                scored = [
                    self.transition(output[i : i + 1], x[i : i + 1], int(step), following[i : i + 1])[2]
                    for i, step in enumerate(at)
                ]
                adv = advantages[part]
                ratio = torch.exp(torch.cat(scored) - log_probs[rows, at])
                clip = train.ratio_clip()
                low, high = clip if isinstance(clip, tuple) else (clip, clip)
                clipped = torch.clamp(ratio, 1 - low, 1 + high)
                loss = torch.maximum(-adv * ratio, -adv * clipped).sum() / (batch * count)
                loss.backward()
                if self.rows == 1:
                    average = loss.detach().clone()
                    dist.all_reduce(average)
                    self.losses.append(average.item())
        torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def repeated(conditioning: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """One prompt's conditioning for `count` rows."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in conditioning.items()}
