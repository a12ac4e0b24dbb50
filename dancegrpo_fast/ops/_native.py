"""The ops by the compiled modules: addresses, dtype codes, sizes and strides, for C++ on the CPU and CUDA alike."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._call import GradientTerms, LossOutputs, Noise, Objective, Transition

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def operand(tensor: Tensor | None, numel: int) -> tuple[Any, ...] | None:
    """`[B, ...]` of so many elements a sample as the modules read it; contiguous samples go without sizes."""
    if tensor is None:
        return None
    if tensor.is_contiguous():
        return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], numel
    first, *strides = tensor.stride()
    found = tensor.data_ptr(), DTYPE_CODES[tensor.dtype], first
    return found if tensor[0].is_contiguous() else (*found, tuple(tensor.shape[1:]), tuple(strides))


def address(tensor: Tensor | None) -> int:
    """A contiguous tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _check_devices(call: Transition, *others: Tensor | None) -> None:
    """Addresses of another device would be followed all the same."""
    device = call.latents.device
    for name, value in (("table", call.table), ("step", call.step), ("sample_ids", others[0] if others else None)):
        if value is not None and value.device != device:
            raise ValueError(f"{name}: got a tensor on {value.device}, want it on latents' device, {device}")


def _shared(call: Transition, launch: int | tuple[int, ...]) -> tuple[Any, ...]:
    """The argument that every entry point takes first."""
    numel = call.numel
    return (
        operand(call.latents, numel),
        operand(call.model_output, numel),
        operand(call.uncond_output, numel),
        operand(call.next_latents, numel),
        call.batch,
        numel,
        call.table.data_ptr(),
        call.table.shape[0],
        address(call.step),
        call.step_index,
        call.guidance_scale,
        call.reference_rounding,
        call.table.dtype == torch.float64,
        launch,
    )


def _run(call: Transition, name: str, *rest: Any, sums: bool = True) -> None:
    """Calls an entry point of the module for the call's device; `sums`: the kernel needs room for partial sums."""
    if call.latents.is_cpu:
        threads = backends.threads_for(call.latents.numel())
        getattr(backends.cpu_module(), name)(_shared(call, threads), *rest)
        return
    device = call.latents.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(call, name, *rest, sums=sums)
        return
    module = backends.cuda_module()
    # What torch's own compiled code calls: building a Stream object costs more than all else here.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if not sums:
        getattr(module, name)(_shared(call, (stream, 0, 0)), *rest)
        return
    count = call.batch + 1
    scratch = torch.empty(module.scratch_size(call.batch, call.numel), dtype=torch.float64, device=device)
    tickets = module.tickets(device.index, stream, count, torch.cuda.is_current_stream_capturing())
    if not tickets:
        spare = torch.zeros(count, dtype=torch.int32, device=device)
        tickets = spare.data_ptr()
    getattr(module, name)(_shared(call, (stream, tickets, scratch.data_ptr())), *rest)


def sample(call: Transition, noise: Noise, log_prob: Tensor, denoised: Tensor | None) -> None:
    """Writes the next latents, their log-probability and, where asked for, the estimate of x0."""
    ids = None if noise.sample_ids is None else noise.sample_ids.contiguous()
    _check_devices(call, ids)
    _run(
        call,
        "transition_sample",
        operand(noise.given, call.numel),
        noise.seed,
        address(ids),
        operand(denoised, call.numel),
        log_prob.data_ptr(),
    )
    # The write went through a raw pointer, which autograd's version counter does not see.
    torch.autograd.graph.increment_version(call.next_latents)


def log_prob(call: Transition, log_prob: Tensor) -> None:
    """Writes the log-probability of the next latents."""
    _check_devices(call)
    _run(call, "transition_log_prob", log_prob.data_ptr())


def log_prob_gradient(call: Transition, grad_log_prob: Tensor, grad_output: Tensor, grad_uncond: Tensor | None) -> None:
    """Writes the gradients of `sum(grad_log_prob log_prob)` by the model outputs."""
    _check_devices(call)
    grad_log_prob = grad_log_prob.to(call.table.dtype).contiguous()
    _run(
        call,
        "transition_log_prob_gradient",
        grad_log_prob.data_ptr(),
        operand(grad_output, call.numel),
        operand(grad_uncond, call.numel),
        sums=False,
    )


def policy_loss(call: Transition, objective: Objective, out: LossOutputs) -> None:
    """Writes the loss and everything that comes out of the same pass."""
    _check_devices(call)
    _run(
        call,
        "policy_loss",
        operand(objective.reference_output, call.numel),
        operand(objective.old_output, call.numel),
        objective.old_log_prob.data_ptr(),
        objective.advantages.data_ptr(),
        address(objective.weight),
        objective.clip_low,
        objective.clip_high,
        objective.advantage_clip,
        objective.kl_weight,
        objective.ratio_norm,
        tuple(t.data_ptr() for t in out),
    )


def policy_loss_gradient(
    call: Transition, terms: GradientTerms, grad_output: Tensor, grad_uncond: Tensor | None
) -> None:
    """Writes the gradients of the loss by the model outputs."""
    _check_devices(call)
    grad_loss = terms.grad_loss.to(call.table.dtype)
    _run(
        call,
        "policy_loss_gradient",
        grad_loss.data_ptr(),
        terms.step_scale.data_ptr(),
        terms.pull_scale.data_ptr(),
        operand(terms.pull, call.numel),
        operand(terms.mean_output, call.numel),
        operand(grad_output, call.numel),
        operand(grad_uncond, call.numel),
        sums=False,
    )
