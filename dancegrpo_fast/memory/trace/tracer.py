"""Follows every tensor storage of a model's forward, backward and optimiser step from birth to death.

`trace` runs on fake tensors: nothing is allocated or computed. `measure` keeps the same books of real tensors.
"""

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...activations import operators
from .fake import CudaOperators, fake_tensors
from .recorder import Recorder, tensors_in
from .result import Trace

OPTIMIZERS = ("fused", "foreach", "single")
# torch.optim hides its modules.
_adam = importlib.import_module("torch.optim.adam")


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Inside, cycles are collected between phases only, and nothing older is looked through again and again.

    May be nested: around several traces, what is older than all of them is looked through once.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        # A section around this one gives everything back at its end.
        if enabled:
            gc.unfreeze()
            gc.enable()


def _optimizer(kind: str | None, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    if kind is None:
        return None
    if kind not in OPTIMIZERS:
        raise ValueError(f'optimizer: got "{kind}", want None, {" or ".join(OPTIMIZERS)}')
    if not parameters:
        raise ValueError("optimizer: got a model without trainable parameters, want None for it")
    return torch.optim.AdamW(parameters, lr=0.0, fused=kind == "fused", foreach=kind == "foreach")


def _first_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Makes the optimiser's state, as it is from the second iteration on; returns its tensors."""
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def _run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    call: Callable[..., Any],
    train: bool,
    grads: bool,
    optimizer: str | None,
    autocast: torch.dtype | None,
    loss: Callable[[Any], Tensor] | None,
    modes: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    workspace: Callable[[Any, Any, Any], int] = operators.no_workspace,
) -> Trace:
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = _optimizer(optimizer, parameters)
    with collected():
        state = [] if adam is None else _first_step(adam, parameters)
        if train and grads:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        recorder = Recorder({id(module): name for name, module in model.named_modules()}, modes, workspace)
        with recorder.phase("load"):
            for path, module in model.named_modules():
                # Tables that are no buffers lie among the attributes.
                for tensor in tensors_in(
                    (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
                ):
                    recorder.note(tensor, "load", path, "parameters")
                for p in module._parameters.values():
                    if p is not None and p.grad is not None:
                        recorder.note(p.grad, "load", path, "gradients")
            for tensor in state:
                recorder.note(tensor, "load", "", "optimizer")
            for tensor in tree_leaves(inputs):
                if isinstance(tensor, Tensor):
                    recorder.note(tensor, "load", "", "inputs")
        with recorder.watching():
            mixed = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
            with torch.set_grad_enabled(train):
                with recorder.phase("forward" if train else "rollout"), mixed:
                    outputs = call(**inputs)
                leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
                recorder.sort_forward(leaves)
                if train:
                    with recorder.phase("backward"):
                        _backward(outputs, leaves, loss)
                    del outputs, leaves
                    if adam is not None:
                        with recorder.phase("optimizer"):
                            adam.step()
        recorder.sort_rest(p.grad for p in parameters if p.grad is not None)
        return recorder.result()


def _backward(outputs: Any, leaves: list[Tensor], loss: Callable[[Any], Tensor] | None) -> None:
    if loss is not None:
        loss(outputs).backward()
        return
    asked = [t for t in leaves if t.requires_grad]
    if not asked:
        raise ValueError("train: got True for a model whose output needs no gradient, want a trainable parameter")
    torch.autograd.backward(asked, [torch.ones_like(t) for t in asked])


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    train: bool = True,
    attention: str = "flash",
    grads: bool = True,
    optimizer: str | None = None,
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    call: Callable[..., Any] | None = None,
    fused_norm: bool = True,
    workspaces: bool | None = None,
) -> Trace:
    """Runs a model on fake tensors and follows every storage.

    Phases: "load" (what is there before: parameters, gradients, optimiser state, inputs), then "forward", "backward"
    and "optimizer", or "rollout" alone, which is a forward without gradients. Bytes are exact for tensors; of what
    allocators, libraries and kernels take beside them, workspaces of attention and convolutions are in them.

    Args:
        model: on the `meta` device, or real; LoRA layers, checkpointing and `accelerate` are put in before. It is the
            same afterwards.
        inputs: keyword arguments of the call, on the `meta` device or real.
        train: forward and backward; False: one forward without gradients.
        attention: "flash", "efficient", "cudnn" or "math", as on CUDA, or "cpu".
        grads: `.grad` is there before the forward, as in every micro-step but the first.
        optimizer: "fused", "foreach" or "single" (one tensor after another, as on the CPU): AdamW, its state there from
            the start, and a step at the end. None: neither.
        autocast: dtype of CUDA's autocast around the forward, or None.
        loss: makes a scalar from the output; by default the backward starts from a gradient of the output.
        call: what to call instead of the model, such as a VAE's `decode`.
        fused_norm: RMSNorm is one operator, as on CUDA from torch 2.9 on; a CPU takes it apart.
        workspaces: count what operators take within themselves; None: CUDA's, but not a CPU's, which `measure` does not
            see.

    Raises:
        ValueError: an unknown `attention` or `optimizer`, or training without trainable parameters.
    """
    # A fake step count has no value, which foreach asks for.
    counts = mock.patch.object(_adam, "_get_value", lambda _: 1.0)
    on_cpu = attention == "cpu"
    counted = not on_cpu if workspaces is None else workspaces
    workspace = operators.cpu_workspace if on_cpu else operators.workspace
    with counts, fake_tensors(model, attention=attention, fused_norm=fused_norm) as convert:
        given = convert(dict(inputs))
        return _run(
            *(model, given, call or model, train, grads, optimizer, autocast, loss),
            lambda: CudaOperators(attention, fused_norm),
            workspace if counted else operators.no_workspace,
        )


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    train: bool = True,
    optimizer: str | None = None,
    autocast: torch.dtype | None = None,
) -> Trace:
    """Keeps the same books while a real model runs; its gradients and, at a step, its weights change.

    See `trace` for the arguments; `trace(..., attention="cpu")` predicts what this measures.

    Raises:
        ValueError: an unknown `optimizer`, or training without trainable parameters.
    """
    on_cuda = any(p.device.type == "cuda" for p in model.parameters())
    workspace = operators.workspace if on_cuda else operators.no_workspace
    return _run(model, inputs, model, train, True, optimizer, autocast, None, workspace=workspace)
