"""Sampling: the model and `transition_step`, one trajectory; and the micro-batch that the replay repeats."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import Conditioning, GeneratorModel
from .ops.noise import gaussian_noise
from .ops.transition import transition_step
from .trajectory import Trajectory
from .transitions import TransitionTable


@dataclass(frozen=True)
class Policy:
    """The model as rollout and replay both call it.

    Every call has `rows` rows whatever is asked for; missing ones repeat the last and their outputs are dropped. The
    ratio is exactly 1 on policy because a row's arithmetic then never depends on how many rows there were to compute.

    Attributes:
        model: the family; its denoiser draws the rollout.
        rows: of every model call, the micro-batch.
        guidance_scale: 1 for none.
        unconditional: the empty prompt's conditioning under guidance.
        rows_are_equal: the model gives the same bits in whichever row a sample sits (see `rows_are_equal`).
    """

    model: GeneratorModel
    rows: int
    guidance_scale: float
    unconditional: Conditioning | None
    rows_are_equal: bool = False

    def __call__(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs `[n, ...]` for `n <= rows` samples: the conditional one, and the unconditional one under guidance."""
        count = latents.shape[0]
        output, uncond = self.model.predict(
            denoiser,
            pad_rows(latents, self.rows),
            pad_rows(times, self.rows),
            {name: pad_rows(value, self.rows) for name, value in conditioning.items()},
            self.unconditional,
            self.guidance_scale,
        )
        return output[:count], None if uncond is None else uncond[:count]


@torch.no_grad()
def rows_are_equal(policy: Policy, table: TransitionTable, conditioning: Conditioning) -> bool:
    """Whether the model's bits do not depend on the row of the micro-batch, tried for every row and every shift.

    Matrix products may treat the last rows of a batch differently; where they do, a sample has to be replayed in the
    row it was sampled in.
    """
    rows = policy.rows
    device = next(iter(conditioning.values())).device
    latents = gaussian_noise(policy.model.latent_shape, seed=0, sample_ids=torch.arange(rows, device=device))
    times = table.times.to(device, torch.float32)[torch.arange(rows, device=device) % len(table)]
    prompts = torch.arange(rows, device=device) % len(next(iter(conditioning.values())))
    outputs = policy(policy.model.denoiser, latents, times, select(conditioning, prompts))
    for shift in range(1, rows):
        order = torch.arange(rows, device=device).roll(shift)
        moved = policy(policy.model.denoiser, latents[order], times[order], select(conditioning, prompts[order]))
        for before, after in zip(outputs, moved, strict=True):
            if before is not None and after is not None and not torch.equal(before[order], after):
                return False
    return True


def pad_rows(values: Tensor, rows: int) -> Tensor:
    """Repeats the last row up to `rows`."""
    missing = rows - values.shape[0]
    return values if missing == 0 else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


def chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def select(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """Rows of every conditioning tensor."""
    return {name: value[rows] for name, value in conditioning.items()}


@torch.no_grad()
def rollout(
    policy: Policy,
    table: TransitionTable,
    noise: Tensor,
    group_size: int,
    conditioning: Conditioning,
    *,
    seed: int,
    sample_ids: Tensor,
    shared_first_step: bool,
    keep_outputs: bool = False,
) -> Trajectory:
    """Samples `B = P group_size` trajectories; samples of a prompt are neighbours.

    Args:
        policy: the model.
        table: the sampler, T steps.
        noise: `[P, ...]` initial latents per prompt with `shared_first_step`, else `[B, ...]` per sample.
        group_size: G, samples of each prompt.
        conditioning: one row per prompt.
        seed: of the step noise, keyed by `sample_ids` (int64 `[B]`).
        shared_first_step: the samples of a prompt start equal, so the model's first call is made once per prompt.
        keep_outputs: store the (guided) model outputs, which RatioNorm needs.

    Returns:
        The trajectory, in the dtype of `noise`.
    """
    batch, steps = len(sample_ids), len(table)
    prompt_index = torch.arange(batch, device=noise.device) // group_size
    times = table.times.to(noise.device, torch.float32)
    trajectory = Trajectory.allocate(
        batch,
        steps,
        tuple(noise.shape[1:]),
        dtype=noise.dtype,
        device=noise.device,
        output_dtype=torch.float32 if keep_outputs else None,
    )
    first = 0
    if shared_first_step:
        _shared_first_step(policy, table, noise, group_size, conditioning, seed, sample_ids, trajectory)
        first = 1
    else:
        trajectory.latents[:, 0].copy_(noise)
    for part in chunks(batch, policy.rows):
        rows = trajectory.rows(part.start, part.stop)
        embeds = select(conditioning, prompt_index[part])
        for step in range(first, steps):
            latents = rows.latents[:, step]
            output, uncond = policy(policy.model.denoiser, latents, times[step].expand(len(latents)), embeds)
            _advance(policy, table, step, output, uncond, rows, seed, sample_ids[part])
    return trajectory


def _advance(
    policy: Policy,
    table: TransitionTable,
    step: int,
    output: Tensor,
    uncond: Tensor | None,
    rows: Trajectory,
    seed: int,
    sample_ids: Tensor,
) -> None:
    """One transition of the samples in `rows`, written into their buffer."""
    last = step == len(table) - 1
    out = transition_step(
        rows.latents[:, step],
        output,
        table,
        step,
        seed=seed,
        sample_ids=sample_ids,
        uncond_output=uncond,
        guidance_scale=None if uncond is None else policy.guidance_scale,
        out=rows.latents[:, step + 1],
        return_denoised=last,
    )
    rows.log_probs[:, step] = out.log_prob
    if last and out.denoised is not None:
        rows.denoised.copy_(out.denoised)
    if rows.outputs is not None:
        rows.outputs[:, step] = guided_output(output, uncond, policy.guidance_scale)


def guided_output(output: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in float32, as the kernels combine it."""
    if uncond is None:
        return output.float()
    return uncond.float() + guidance_scale * (output.float() - uncond.float())


def _shared_first_step(
    policy: Policy,
    table: TransitionTable,
    noise: Tensor,
    group_size: int,
    conditioning: Conditioning,
    seed: int,
    sample_ids: Tensor,
    trajectory: Trajectory,
) -> None:
    prompts = len(noise)
    times = table.times[:1].to(noise.device, torch.float32).expand(prompts)
    for part in chunks(prompts, policy.rows):
        embeds = {name: value[part] for name, value in conditioning.items()}
        output, uncond = policy(policy.model.denoiser, noise[part], times[part], embeds)
        for row, prompt in enumerate(range(part.start, part.stop)):
            group = slice(prompt * group_size, (prompt + 1) * group_size)
            shared = trajectory.rows(group.start, group.stop)
            shared.latents[:, 0].copy_(noise[prompt])
            _advance(
                policy,
                table,
                0,
                output[row].expand_as(shared.denoised),
                None if uncond is None else uncond[row].expand_as(shared.denoised),
                shared,
                seed,
                sample_ids[group],
            )
