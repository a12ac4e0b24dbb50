"""What a rollout leaves behind: one buffer of latents, of which every step is a view."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """Latents, scores and final images of B samples over T steps.

    Attributes:
        latents: `[B, T + 1, ...]`; entry `t` is the input of step `t` and entry `t + 1` what it drew.
        log_probs: float32 `[B, T]`, as scored when sampled.
        denoised: `[B, ...]`, the estimate of x0 at the last step.
        outputs: `[B, T, ...]`, the (guided) model outputs, where a loss needs them.
    """

    latents: Tensor
    log_probs: Tensor
    denoised: Tensor
    outputs: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        batch: int,
        num_steps: int,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        output_dtype: torch.dtype | None = None,
    ) -> "Trajectory":
        """Uninitialised buffers; `output_dtype` asks for room for the model outputs."""
        outputs = None
        if output_dtype is not None:
            outputs = torch.empty(batch, num_steps, *shape, dtype=output_dtype, device=device)
        return cls(
            torch.empty(batch, num_steps + 1, *shape, dtype=dtype, device=device),
            torch.zeros(batch, num_steps, dtype=torch.float32, device=device),
            torch.empty(batch, *shape, dtype=dtype, device=device),
            outputs,
        )

    def rows(self, start: int, stop: int) -> "Trajectory":
        """Samples `start` to `stop` as views of the same memory."""
        outputs = None if self.outputs is None else self.outputs[start:stop]
        return Trajectory(self.latents[start:stop], self.log_probs[start:stop], self.denoised[start:stop], outputs)

    def like(self, batch: int) -> "Trajectory":
        """Uninitialised buffers for `batch` samples of the same steps, shape and dtypes."""
        outputs = None if self.outputs is None else self.outputs.new_empty(batch, *self.outputs.shape[1:])
        return Trajectory(
            self.latents.new_empty(batch, *self.latents.shape[1:]),
            self.log_probs.new_empty(batch, *self.log_probs.shape[1:]),
            self.denoised.new_empty(batch, *self.denoised.shape[1:]),
            outputs,
        )

    def put(self, start: int, other: "Trajectory", samples: Tensor) -> None:
        """Copies `samples` (int64 `[n]`) of another trajectory to the rows from `start` on."""
        rows = self.rows(start, start + len(samples))
        for ours, theirs in (
            (rows.latents, other.latents),
            (rows.log_probs, other.log_probs),
            (rows.denoised, other.denoised),
            (rows.outputs, other.outputs),
        ):
            if ours is not None and theirs is not None:
                torch.index_select(theirs, 0, samples, out=ours)
