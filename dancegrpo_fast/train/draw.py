"""Sampling: the model and `transition_step`, one trajectory; and the micro-batch that the replay repeats."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import Conditioning, GeneratorModel
from ..ops.noise import gaussian_noise
from ..ops.transition import transition_step
from ..transitions import TransitionTable
from .trajectory import Trajectory


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
    latents, times, embeds = probe(policy, table, conditioning)
    outputs = policy(policy.model.denoiser, latents, times, embeds)
    for shift in range(1, rows):
        order = torch.arange(rows, device=latents.device).roll(shift)
        moved = policy(policy.model.denoiser, latents[order], times[order], select(embeds, order))
        for before, after in zip(outputs, moved, strict=True):
            if before is not None and after is not None and not torch.equal(before[order], after):
                return False
    return True


def probe(policy: Policy, table: TransitionTable, conditioning: Conditioning) -> tuple[Tensor, Tensor, Conditioning]:
    """Inputs of one model call that belong to no sample: latents, times and conditioning."""
    embeds = next(iter(conditioning.values()))
    index = torch.arange(policy.rows, device=embeds.device)
    latents = gaussian_noise(policy.model.latent_shape, seed=0, sample_ids=index)
    times = table.times.to(embeds.device, torch.float32)[index % len(table)]
    return latents, times, select(conditioning, index % len(embeds))


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


@dataclass(frozen=True)
class Start:
    """What the samples of each of P prompts have in common when they start from one noise.

    The steps before the first stochastic one follow the ODE, and that one's model call still has one input a prompt.

    Attributes:
        latents: `[P, k + 1, ...]`, the inputs of steps 0 to k, of which step k is the first stochastic one.
        log_probs: float32 `[P, k]` of the steps before it.
        output, uncond: the model's at step k, `[P, ...]`.
        outputs: float32 `[P, k, ...]`, the guided ones before it, where they are kept.
    """

    latents: Tensor
    log_probs: Tensor
    output: Tensor
    uncond: Tensor | None
    outputs: Tensor | None

    @property
    def step(self) -> int:
        """k."""
        return self.latents.shape[1] - 1


def shared_step(table: TransitionTable) -> int:
    """The first stochastic step; samples that start equal have equal inputs up to it.

    Raises:
        ValueError: the table has none.
    """
    stochastic = table.tau.gt(0).nonzero()
    if len(stochastic) == 0:
        raise ValueError("table: got no stochastic step, want one where samples that start equal part")
    return int(stochastic[0])


def model_calls(policy: Policy, table: TransitionTable, prompts: int, samples: int, *, shared: bool) -> int:
    """How many times sampling calls the model for `samples` of `prompts`."""
    first = shared_step(table) + 1 if shared else 0
    return first * -(-prompts // policy.rows) + (len(table) - first) * -(-samples // policy.rows)


@torch.no_grad()
def shared_start(
    policy: Policy,
    table: TransitionTable,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    keep_outputs: bool = False,
) -> Start:
    """Computes once what samples that start from `noise` `[P, ...]`, one row a prompt, have in common."""
    prompts, last = len(noise), shared_step(table)
    times = table.times.to(noise.device, torch.float32)
    made = Trajectory.allocate(
        prompts,
        last,
        tuple(noise.shape[1:]),
        dtype=noise.dtype,
        device=noise.device,
        output_dtype=torch.float32 if keep_outputs else None,
    )
    made.latents[:, 0].copy_(noise)
    ids = torch.arange(prompts, device=noise.device)
    ends: list[tuple[Tensor, Tensor | None]] = []
    for part in chunks(prompts, policy.rows):
        rows = made.rows(part.start, part.stop)
        embeds = {name: value[part] for name, value in conditioning.items()}
        for step in range(last + 1):
            latents = rows.latents[:, step]
            output, uncond = policy(policy.model.denoiser, latents, times[step].expand(len(latents)), embeds)
            if step == last:
                ends.append((output, uncond))
            else:
                _advance(policy, table, step, output, uncond, rows, 0, ids[part])
    unconds = [uncond for _, uncond in ends if uncond is not None]
    return Start(
        made.latents,
        made.log_probs,
        torch.cat([output for output, _ in ends]),
        torch.cat(unconds) if unconds else None,
        made.outputs,
    )


@torch.no_grad()
def sample(
    policy: Policy,
    table: TransitionTable,
    start: Start | Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    *,
    seed: int,
    sample_ids: Tensor,
    keep_outputs: bool = False,
) -> Trajectory:
    """Draws the trajectories of B samples.

    Args:
        policy: the model.
        table: the sampler, T steps.
        start: what the samples of a prompt share, or `[B, ...]` initial latents of each sample.
        prompt_index: int64 `[B]`, each sample's row of `conditioning` and of `start`.
        conditioning: one row per prompt.
        seed: of the step noise, keyed by `sample_ids` (int64 `[B]`).
        sample_ids: of the samples.
        keep_outputs: store the (guided) model outputs, which RatioNorm needs.

    Returns:
        The trajectory, in the dtype of the initial latents. Sample `i` sits in row `i % rows` of its model calls.
    """
    batch, steps = len(sample_ids), len(table)
    initial = start.latents[:, 0] if isinstance(start, Start) else start
    times = table.times.to(initial.device, torch.float32)
    trajectory = Trajectory.allocate(
        batch,
        steps,
        tuple(initial.shape[1:]),
        dtype=initial.dtype,
        device=initial.device,
        output_dtype=torch.float32 if keep_outputs else None,
    )
    first = 0
    if isinstance(start, Start):
        first = start.step + 1
        _expand(policy, table, start, prompt_index, trajectory, seed, sample_ids)
    else:
        trajectory.latents[:, 0].copy_(initial)
    for part in chunks(batch, policy.rows):
        rows = trajectory.rows(part.start, part.stop)
        embeds = select(conditioning, prompt_index[part])
        for step in range(first, steps):
            latents = rows.latents[:, step]
            output, uncond = policy(policy.model.denoiser, latents, times[step].expand(len(latents)), embeds)
            _advance(policy, table, step, output, uncond, rows, seed, sample_ids[part])
    return trajectory


@torch.no_grad()
def fill_calls(policy: Policy, table: TransitionTable, conditioning: Conditioning, calls: int) -> None:
    """Calls the model for nothing, on a process that has fewer calls than another which gathers parameters with it."""
    inputs = probe(policy, table, conditioning)
    for _ in range(calls):
        policy(policy.model.denoiser, *inputs)


def rollout(
    policy: Policy,
    table: TransitionTable,
    noise: Tensor,
    group_size: int,
    conditioning: Conditioning,
    *,
    seed: int,
    sample_ids: Tensor,
    shared_noise: bool,
    keep_outputs: bool = False,
) -> Trajectory:
    """`sample` for whole groups of neighbours; `noise` is `[P, ...]` with `shared_noise`, else `[B, ...]`."""
    start = shared_start(policy, table, noise, conditioning, keep_outputs=keep_outputs) if shared_noise else noise
    index = torch.arange(len(sample_ids), device=noise.device) // group_size
    return sample(
        policy, table, start, index, conditioning, seed=seed, sample_ids=sample_ids, keep_outputs=keep_outputs
    )


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


def _expand(
    policy: Policy,
    table: TransitionTable,
    start: Start,
    prompt_index: Tensor,
    trajectory: Trajectory,
    seed: int,
    sample_ids: Tensor,
) -> None:
    """The shared steps of every sample, and the first stochastic one, in micro-batches that call no model."""
    step = start.step
    for part in chunks(len(sample_ids), policy.rows):
        rows, prompts = trajectory.rows(part.start, part.stop), prompt_index[part]
        rows.latents[:, : step + 1].copy_(start.latents[prompts])
        rows.log_probs[:, :step].copy_(start.log_probs[prompts])
        if rows.outputs is not None and start.outputs is not None:
            rows.outputs[:, :step].copy_(start.outputs[prompts])
        uncond = None if start.uncond is None else start.uncond[prompts]
        _advance(policy, table, step, start.output[prompts], uncond, rows, seed, sample_ids[part])
