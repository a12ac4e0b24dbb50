"""A few calls of every op, for tools that watch a program: `python -m bench.gpu.driver cuda cuda --size 5000`."""

import argparse
from typing import Any

import torch

import dancegrpo_fast as dgf


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device")
    parser.add_argument("backend")
    parser.add_argument("--size", type=int, help="one shape of so many elements, aligned, instead of many small ones")
    options = parser.parse_args()
    if options.size:
        call_every_op(options.device, options.backend, 8, options.size, torch.float32, 0)
    else:
        # One element, around a lane's window and the blocks of the kernels, several blocks, odd offsets.
        for elements in (1, 9, 2047, 2049, 4097, 9001):
            for dtype, shift in ((torch.float32, 0), (torch.bfloat16, 3)):
                call_every_op(options.device, options.backend, 3, elements, dtype, shift)
    if options.device != "cpu":
        torch.cuda.synchronize()
    print("every op was called")


if __name__ == "__main__":
    main()
