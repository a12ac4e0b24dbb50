"""The ops by the compiled modules: addresses, dtype codes, sizes and strides, for C++ on the CPU and CUDA alike."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._call import GradientTerms, LossOutputs, Noise, Objective, Transition

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Per (device, stream): tickets, which the kernels leave at zero, and scratch for partial sums. Launches on one stream
# follow one another, so they may share them.
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def operand(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """`[B, ...]` as the modules read it; contiguous samples go without sizes."""
    if tensor is None:
        return None
    code = DTYPE_CODES[tensor.dtype]
    # The first test is the cheap one: indexing builds a view.
    if tensor.is_contiguous() or tensor[0].is_contiguous():
        return tensor.data_ptr(), code, tensor.stride(0)
    return tensor.data_ptr(), code, tensor.stride(0), tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])


def address(tensor: Tensor | None) -> int:
    """A contiguous tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(device: torch.device, stream: int, tickets: int, scratch: int) -> tuple[Tensor, Tensor]:
    def make(ticket_count: int, scratch_count: int) -> tuple[Tensor, Tensor]:
        return (
            torch.zeros(ticket_count, dtype=torch.int32, device=device),
            torch.empty(scratch_count, dtype=torch.float64, device=device),
        )

    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream: it gets its own, zeroed inside the graph.
        return make(tickets, scratch)
    kept = _workspaces.get((device.index, stream))
    if kept is None or kept[0].numel() < tickets or kept[1].numel() < scratch:
        kept = make(max(tickets, 1024), max(scratch, 1 << 14))
        _workspaces[device.index, stream] = kept
    return kept


def _arguments(call: Transition) -> tuple[ModuleType, tuple[Any, ...], tuple[Tensor, ...]]:
    """The module, the argument that every entry point shares, and what must live until the launch."""
    device = call.latents.device
    batch, numel = call.batch, call.numel
    launch: int | tuple[int, ...]
    workspace: tuple[Tensor, ...] = ()
    if device.type == "cpu":
        module = backends.cpu_module()
        launch = backends.threads_for(batch * numel)
    else:
        module = backends.cuda_module()
        stream = torch.cuda.current_stream(device).cuda_stream
        workspace = _workspace(device, stream, *module.workspace_size(batch, numel))
        launch = (device.index, stream, *(t.data_ptr() for t in workspace))
    return (
        module,
        (
            operand(call.latents),
            operand(call.model_output),
            operand(call.uncond_output),
            operand(call.next_latents),
            batch,
            numel,
            call.table.data_ptr(),
            call.table.shape[0],
            address(call.step),
            call.step_index,
            call.guidance_scale,
            call.reference_rounding,
            call.table.dtype == torch.float64,
            launch,
        ),
        workspace,
    )


def sample(call: Transition, noise: Noise, log_prob: Tensor, denoised: Tensor | None) -> None:
    """Writes the next latents, their log-probability and, where asked for, the estimate of x0."""
    module, arguments, _alive = _arguments(call)
    ids = None if noise.sample_ids is None else noise.sample_ids.contiguous()
    module.transition_sample(
        arguments, operand(noise.given), noise.seed, address(ids), operand(denoised), log_prob.data_ptr()
    )
    # The write went through a raw pointer, which autograd's version counter does not see.
    torch.autograd.graph.increment_version(call.next_latents)


def log_prob(call: Transition, log_prob: Tensor) -> None:
    """Writes the log-probability of the next latents."""
    module, arguments, _alive = _arguments(call)
    module.transition_log_prob(arguments, log_prob.data_ptr())


def log_prob_gradient(call: Transition, grad_log_prob: Tensor, grad_output: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients of `sum(grad_log_prob log_prob)` by the model outputs."""
    module, arguments, _alive = _arguments(call)
    grad_log_prob = grad_log_prob.to(call.table.dtype).contiguous()
    module.transition_log_prob_gradient(arguments, grad_log_prob.data_ptr(), operand(grad_output), operand(grad_uncond))


def policy_loss(call: Transition, objective: Objective, out: LossOutputs) -> None:
    """Writes the loss and everything that comes out of the same pass."""
    module, arguments, _alive = _arguments(call)
    module.policy_loss(
        arguments,
        operand(objective.reference_output),
        operand(objective.old_output),
        objective.old_log_prob.data_ptr(),
        objective.advantages.data_ptr(),
        objective.weight.data_ptr(),
        objective.clip_range,
        objective.advantage_clip,
        objective.kl_weight,
        objective.ratio_norm,
        tuple(t.data_ptr() for t in out),
    )


def policy_loss_gradient(
    call: Transition, terms: GradientTerms, grad_output: Tensor, grad_uncond: Tensor | None
) -> None:
    """Writes the gradients of the loss by the model outputs."""
    module, arguments, _alive = _arguments(call)
    grad_loss = terms.grad_loss.to(call.table.dtype)
    module.policy_loss_gradient(
        arguments,
        grad_loss.data_ptr(),
        terms.step_scale.data_ptr(),
        terms.pull_scale.data_ptr(),
        operand(terms.pull),
        operand(terms.mean_output),
        operand(grad_output),
        operand(grad_uncond),
    )
