"""A few calls of every op, for tools that watch a program: `python -m bench.gpu.driver cuda`."""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import dancegrpo_fast as dgf
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope


def call_every_op(device: str, backend: str, batch: int, elements: int, dtype: torch.dtype, shift: int) -> None:
    """A seeded step, a score and a loss, both with gradients, on tensors that begin `shift` elements into memory."""
    generator = torch.Generator().manual_seed(0)

    def draw(to: torch.dtype) -> torch.Tensor:
        # Drawn on the CPU, so that few kernels but ours run.
        whole = torch.randn(batch * elements + shift, generator=generator).to(to).to(device)
        return whole[shift:].view(batch, elements)

    table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(4, 3.0), 0.3)
    x, v, u, noise = draw(torch.float32), draw(dtype), draw(dtype), draw(torch.float32)
    guidance: dict[str, Any] = {"uncond_output": u, "guidance_scale": 3.0, "backend": backend}
    advantages, weight = (torch.ones(batch).to(device) for _ in range(2))
    steps = (torch.arange(batch) % 4).to(device)
    for index in (1, steps):
        dgf.transition_step(x, v, table, index, seed=1, backend=backend)
        step = dgf.transition_step(x, v, table, index, noise=noise, return_denoised=True, out_dtype=dtype, **guidance)
        leaf = v.clone().requires_grad_()
        score = dgf.transition_log_prob(x, leaf, step.latents, table, index, **guidance)
        score.backward(weight)
        loss = dgf.policy_loss(
            x,
            leaf,
            step.latents,
            table,
            index,
            step.log_prob,
            advantages,
            weight=weight,
            reference_output=u,
            kl_weight=0.1,
            **guidance,
        )
        loss.loss.backward(weight[0])


def call_block_ops(device: str, backend: str, dtype: torch.dtype, channels: int, mode: str) -> None:
    """Every op of transformer blocks with all gradients, on few tokens."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens, text, heads, dim = 2, 11, 3, 3, 10
    options: dict[str, Any] = {"mode": mode, "backend": backend}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_()

    def differentiate(outputs: Any, leaves: list[torch.Tensor]) -> None:
        torch.autograd.grad(outputs, leaves, [out.detach() for out in outputs])

    x, y = (draw(batch, tokens, channels) for _ in range(2))
    for rows, split in ((1, None), (2, 4), (tokens, None)):
        gate, scale, shift = (draw(batch, rows, channels) for _ in range(3))
        more = {**options, "split": split}
        differentiate(norm_modulate_fanout(x, scale, shift, consumers=2, **more), [x, scale, shift])
        leaves = [x, y, gate, scale, shift]
        differentiate(gated_residual_norm_modulate(*leaves, **more), leaves)
        differentiate([gated_residual(x, y, gate, **more)], [x, y, gate])
    angles = torch.randn(tokens - 1, dim, generator=generator).to(device)
    streams = [draw(batch, length, heads, dim) for length in (tokens, tokens, text, text)]
    for norm in ("head", "head_twice", "token"):
        weights = [draw(heads * dim if norm == "token" else dim) for _ in streams]
        first = Stream(streams[0], streams[1], weights[0], weights[1], angles.cos(), angles.sin())
        second = Stream(streams[2], streams[3], weights[2], weights[3])
        differentiate(qk_norm_rope(first, second, norm=norm, **options), [*streams, *weights])
    prefix = draw(batch, tokens, 5)
    differentiate([gelu_tanh(x, prefix=prefix, **options)], [x, prefix])


def transitions(device: str, backend: str) -> Iterator[Callable[[], None]]:
    """Calls on samples of one element, around a lane's window and the blocks of the kernels, at odd offsets."""
    for elements in (9001, 2049, 1, 9, 2047, 4097):
        for dtype, shift in ((torch.bfloat16, 3), (torch.float32, 0)):
            yield partial(call_every_op, device, backend, 3, elements, dtype, shift)


def block_ops(device: str, backend: str) -> Iterator[Callable[[], None]]:
    """Calls on a few channels and on more than one access of a lane."""
    for channels, dtype, mode in (
        (261, torch.bfloat16, "lossless"),
        (261, torch.float32, "fast"),
        (5, torch.bfloat16, "lossless"),
        (5, torch.float32, "fast"),
    ):
        yield partial(call_block_ops, device, backend, dtype, channels, mode)


def parts(device: str) -> dict[str, Iterator[Callable[[], None]]]:
    """Part -> calls; on a CPU with what stands there for the kernels."""
    on_cpu = device == "cpu"
    return {
        "cuda": transitions(device, "cpu" if on_cpu else "cuda"),
        "triton": transitions(device, "cpu" if on_cpu else "triton"),
        "block ops": block_ops(device, "reference" if on_cpu else "triton"),
    }


def run(every: dict[str, Iterator[Callable[[], None]]], until: float) -> None:
    """The first calls of each part, then the others; none starts after `until`, on the clock of `time.time`."""
    waiting, called = dict(every), dict.fromkeys(every, 0)
    while waiting and time.time() < until:
        for part in list(waiting):
            call = next(waiting[part], None)
            if call is None:
                del waiting[part]
            elif time.time() < until:
                call()
                called[part] += 1
                print(f"called: {part}", flush=True)
    print("every call was made" if not waiting else f"out of time for more of {', '.join(waiting)}", flush=True)


def three_kernels(device: str) -> None:
    """One sampling step, one loss and one norm, each a launch of a kernel of ours, at real sizes but on a CPU."""
    on_cpu = device == "cpu"
    batch, elements, tokens, channels = (2, 64, 8, 16) if on_cpu else (8, 806_400, 17_056, 3072)
    generator = torch.Generator(device).manual_seed(0)
    x, v, y = (torch.randn(batch, elements, generator=generator, device=device) for _ in range(3))
    table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(4, 3.0), 0.3)
    old, advantages = (torch.zeros(batch, device=device) for _ in range(2))
    hidden = torch.randn(1, tokens, channels, generator=generator, device=device, dtype=torch.bfloat16)
    scale, shift = hidden[:, 0], hidden[:, 1]
    backend = "cpu" if on_cpu else "cuda"
    dgf.transition_step(x, v, table, 1, seed=1, backend=backend)
    dgf.policy_loss(x, v, y, table, 1, old, advantages, backend=backend)
    norm_modulate_fanout(hidden, scale, shift, consumers=3, backend="reference" if on_cpu else "triton")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--until", type=float, default=float("inf"), help="start no call after this Unix time")
    parser.add_argument("--three", action="store_true", help="three kernels at real sizes, once each, instead")
    options = parser.parse_args()
    if options.three:
        three_kernels(options.device)
    else:
        run(parts(options.device), options.until)
    if options.device != "cpu":
        torch.cuda.synchronize()
    print("the program ended", flush=True)


if __name__ == "__main__":
    main()
