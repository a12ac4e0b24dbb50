"""The RL ops by Triton: arguments for the kernels, room for their partial sums, and one launch a call."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..kernels.policy_loss import triton_kernels as loss_kernels
from ..kernels.transition import triton_kernels as kernels
from ._call import GradientTerms, LossOutputs, Noise, Objective, Transition
from ._launch import Varying, launch_on, planned

# Elements a program, what one sum of squares can hold; 16 elements a thread need no spills and fill 16-byte accesses.
BLOCK = 4096
# Partial sums that the last program reads at once.
LANES = 128
# Merged dimensions that the kernels step through; operands with more are copied.
MAX_DIMS = 4
MAX_PROGRAMS = 2**31 - 1
WARPS = 8
# Floats a block leaves (a pair for each sum of squares), and a sample (a pair for each term of loss and metrics).
SCORE_PAIRS, LOSS_PAIRS, TERM_PAIRS = 1, 4, 16

# Per (device, stream): tickets, which the kernels leave at zero, and room for partial sums.
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def programs_for(batch: int, numel: int) -> tuple[int, int]:
    """Programs of a launch, and how many of them share a sample.

    Raises:
        ValueError: more programs than one launch can have.
    """
    blocks = -(-numel // BLOCK)
    if batch * blocks > MAX_PROGRAMS:
        raise ValueError(f"latents: got {batch} samples of {numel} elements, want at most {MAX_PROGRAMS} blocks")
    return batch * blocks, blocks


def needs_wide(numel: int) -> bool:
    """Whether an index in a sample, masked lanes included, passes 32 bits."""
    return numel > 2**31 - BLOCK


def signed_words(seed: int) -> tuple[int, int]:
    """The seed's two words as int32, so that no value of it changes an argument's type."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def is_run(tensor: Tensor) -> bool:
    """Whether each sample is contiguous, whatever the batch stride."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def merged(tensors: list[Tensor]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes of one sample with the dimensions merged that step evenly in all tensors, and each tensor's strides."""
    sizes: list[int] = []
    strides: list[list[int]] = []
    columns = zip(*(t.stride()[1:] for t in tensors), strict=True)
    for size, column in zip(tensors[0].shape[1:], columns, strict=True):
        if size == 1:
            continue
        if sizes and all(before == size * here for before, here in zip(strides[-1], column, strict=True)):
            sizes[-1] *= size
            strides[-1] = list(column)
        else:
            sizes.append(size)
            strides.append(list(column))
    return tuple(sizes), [tuple(column[i] for column in strides) for i in range(len(tensors))]


class Operands:
    """Tensors `[B, ...]` as the kernels read them: `(tensor, batch stride, strides)`, no strides for a run."""

    def __init__(self, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...] = ()):
        self.sizes: tuple[int, ...] = ()
        self._copies: list[tuple[Tensor, Tensor]] = []
        tensors = [*inputs, *outputs]
        strided = [t for t in tensors if t is not None and not t.is_contiguous() and not is_run(t)]
        strides: dict[int, tuple[int, ...]] = {}
        if strided:
            sizes, found = merged(strided)
            if len(sizes) <= MAX_DIMS:
                self.sizes = sizes
                strides = {id(t): s for t, s in zip(strided, found, strict=True)}
            else:
                tensors = [self._as_run(t, i >= len(inputs)) for i, t in enumerate(tensors)]
        self.given = [None if t is None else (t, t.stride(0), strides.get(id(t), ())) for t in tensors]

    def _as_run(self, tensor: Tensor | None, written: bool) -> Tensor | None:
        if tensor is None or is_run(tensor):
            return tensor
        if not written:
            return tensor.contiguous()
        room = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self._copies.append((tensor, room))
        return room

    def finish(self) -> None:
        """Copies what was written beside its place."""
        for tensor, room in self._copies:
            tensor.copy_(room)


def _kept(device: torch.device, make: Callable[..., tuple[Tensor, Tensor]], *counts: int) -> tuple[Tensor, Tensor]:
    """What outlives the call, for the current stream, from the ordinary memory of the device.

    A thread or a stream may have a pool of its own: that of `mode="reduce-overhead"` refuses whatever is still alive
    after a call and none of its results. Another thread, on the default stream, has none.
    """
    with ThreadPoolExecutor(1) as elsewhere:
        made = elsewhere.submit(make, *counts).result()
    stream = torch.cuda.current_stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    for tensor in made:
        tensor.record_stream(stream)
    return made


def _workspace(device: torch.device, tickets: int, room: int) -> tuple[Tensor, Tensor]:
    def make(ticket_count: int, room_count: int) -> tuple[Tensor, Tensor]:
        return (
            torch.zeros(ticket_count, dtype=torch.int32, device=device),
            torch.empty(room_count, dtype=torch.float32, device=device),
        )

    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream: it gets its own, zeroed inside the graph.
        return make(tickets, room)
    # What torch's own compiled code calls: building a Stream object costs more.
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    kept = _workspaces.get(key)
    if kept is None or kept[0].numel() < tickets or kept[1].numel() < room:
        kept = _kept(device, make, max(tickets, 1024), max(room, 1 << 15))
        _workspaces[key] = kept
    return kept


def _settings(call: Transition) -> dict[str, Any]:
    rounded, wide = call.reference_rounding, needs_wide(call.numel)
    return {"rounded": rounded, "wide": wide, "block": BLOCK, "num_warps": WARPS}


def _rows(call: Transition) -> tuple[Any, ...]:
    return call.table, len(call.table), call.step, call.step_index, call.guidance_scale


def _any_step(call: Transition) -> Transition:
    return call._replace(step_index=Varying(call.step_index))


def sample(call: Transition, noise: Noise, log_prob: Tensor, denoised: Tensor | None) -> None:
    """Writes the next latents, their log-probability and, where asked for, the estimate of x0."""
    programs, blocks = programs_for(call.batch, call.numel)
    room = _workspace(call.latents.device, call.batch, programs * 2 * SCORE_PAIRS)
    ids = None if noise.sample_ids is None else noise.sample_ids.contiguous()
    words = None if noise.seed is None else tuple(map(Varying, signed_words(noise.seed)))
    _sample(_any_step(call), noise.given, words, ids, denoised, programs, blocks, room, log_prob)
    # Triton writes through raw pointers, which autograd's version counter does not see.
    torch.autograd.graph.increment_version(call.next_latents)


@planned
def _sample(
    call: Transition,
    noise: Tensor | None,
    words: tuple[int, int] | None,
    ids: Tensor | None,
    denoised: Tensor | None,
    programs: int,
    blocks: int,
    room: tuple[Tensor, Tensor],
    log_prob: Tensor,
) -> None:
    operands = Operands((call.latents, call.model_output, call.uncond_output, noise), (call.next_latents, denoised))
    latents, output, uncond, given, next_latents, clean = operands.given
    tickets, partials = room
    arguments = (
        *(latents, output, uncond, next_latents, given, clean, operands.sizes),
        *_rows(call),
        ids,
        *(words or (0, 0)),
        *(call.numel, blocks, partials, tickets, log_prob),
    )
    settings = {"seeded": words is not None, **_settings(call), "lanes": LANES}
    launch_on(call.latents.device, kernels.sample_kernel, programs, arguments, settings)
    operands.finish()


def log_prob(call: Transition, log_prob: Tensor) -> None:
    """Writes the log-probability of the next latents."""
    programs, blocks = programs_for(call.batch, call.numel)
    room = _workspace(call.latents.device, call.batch, programs * 2 * SCORE_PAIRS)
    _log_prob(_any_step(call), programs, blocks, room, log_prob)


@planned
def _log_prob(call: Transition, programs: int, blocks: int, room: tuple[Tensor, Tensor], log_prob: Tensor) -> None:
    operands = Operands((call.latents, call.model_output, call.uncond_output, call.next_latents))
    tickets, partials = room
    arguments = (*operands.given, operands.sizes, *_rows(call), call.numel, blocks, partials, tickets, log_prob)
    settings = {**_settings(call), "lanes": LANES}
    launch_on(call.latents.device, kernels.log_prob_kernel, programs, arguments, settings)


@planned
def _gradient(
    call: Transition,
    grad_log_prob: Tensor | None,
    terms: GradientTerms | None,
    grad_output: Tensor,
    grad_uncond: Tensor | None,
) -> None:
    programs, blocks = programs_for(call.batch, call.numel)
    pull, mean_output = (None, None) if terms is None else (terms.pull, terms.mean_output)
    operands = Operands(
        (call.latents, call.model_output, call.uncond_output, call.next_latents, pull, mean_output),
        (grad_output, grad_uncond),
    )
    scales: tuple[Tensor | None, ...] = (grad_log_prob, None, None, None)
    if terms is not None:
        scales = (None, terms.grad_loss.to(call.table.dtype), terms.step_scale, terms.pull_scale)
    arguments = (*operands.given, operands.sizes, *_rows(call), *scales, call.numel, blocks)
    launch_on(call.latents.device, kernels.gradient_kernel, programs, arguments, _settings(call))
    operands.finish()


def log_prob_gradient(call: Transition, grad_log_prob: Tensor, grad_output: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients of `sum(grad_log_prob log_prob)` by the model outputs."""
    grad = grad_log_prob.to(call.table.dtype).contiguous()
    _gradient(_any_step(call), grad, None, grad_output, grad_uncond)


def _loss_registers(more_outputs: bool, strided: bool) -> dict[str, int]:
    """How many the loss may use: its last steps on few numbers make ptxas spill to save registers nobody needs."""
    if torch.version.hip is not None:
        return {}
    return {"maxnreg": 255 if strided else 128 if more_outputs else 80}


def policy_loss(call: Transition, objective: Objective, out: LossOutputs) -> None:
    """Writes the loss and everything that comes out of the same pass."""
    programs, blocks = programs_for(call.batch, call.numel)
    room = _workspace(call.latents.device, call.batch + 1, 2 * (programs * LOSS_PAIRS + call.batch * TERM_PAIRS))
    _policy_loss(_any_step(call), objective, programs, blocks, room, out)


@planned
def _policy_loss(
    call: Transition,
    objective: Objective,
    programs: int,
    blocks: int,
    workspace: tuple[Tensor, Tensor],
    out: LossOutputs,
) -> None:
    more = (objective.reference_output, objective.old_output if objective.ratio_norm else None)
    operands = Operands((call.latents, call.model_output, call.uncond_output, call.next_latents, *more))
    tickets, room = workspace
    terms = room[2 * programs * LOSS_PAIRS :]
    arguments = (
        *(*operands.given, operands.sizes),
        *_rows(call),
        *(objective.old_log_prob, objective.advantages, objective.weight),
        *(objective.clip_low, objective.clip_high, objective.advantage_clip, objective.kl_weight),
        *(call.batch, call.numel, blocks, room, terms, tickets),
        *(out.loss, out.log_prob, out.ratio, out.metrics, out.has_grad, out.step_scale, out.pull_scale),
    )
    outputs = any(t is not None for t in (call.uncond_output, *more))
    registers = _loss_registers(outputs, bool(operands.sizes))
    settings = {**_settings(call), "lanes": LANES, **registers}
    launch_on(call.latents.device, loss_kernels.policy_loss_kernel, programs, arguments, settings)


def policy_loss_gradient(
    call: Transition, terms: GradientTerms, grad_output: Tensor, grad_uncond: Tensor | None
) -> None:
    """Writes the gradients of the loss by the model outputs."""
    _gradient(_any_step(call), None, terms, grad_output, grad_uncond)
