"""What a rollout leaves behind: one buffer of latents, of which every step is a view."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """Latents, scores and final images of B samples over T steps.

    Attributes:
        latents: `[B, T + 1, ...]`; entry `t` is the input of step `t` and entry `t + 1` what it drew.
        log_probs: float32 `[B, T]`, as scored when sampled.
        denoised: `[B, ...]`, the estimate of x0 at the last step, where that is what is decoded.
        outputs: float32 `[B, T, ...]`, the (guided) model outputs, where a loss needs them.
    """

    latents: Tensor
    log_probs: Tensor
    denoised: Tensor | None = None
    outputs: Tensor | None = None

    @classmethod
    def allocate(
        cls, batch: int, steps: int, initial: Tensor, *, keep_denoised: bool = False, keep_outputs: bool = False
    ) -> "Trajectory":
        """Buffers for samples of the shape, dtype and device of initial latents `[n, ...]`."""
        shape = initial.shape[1:]
        return cls(
            initial.new_empty(batch, steps + 1, *shape),
            initial.new_zeros(batch, steps, dtype=torch.float32),
            initial.new_empty(batch, *shape) if keep_denoised else None,
            initial.new_empty(batch, steps, *shape, dtype=torch.float32) if keep_outputs else None,
        )

    @property
    def final(self) -> Tensor:
        """What is decoded, `[B, ...]`."""
        return self.latents[:, -1] if self.denoised is None else self.denoised

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Trajectory":
        others = (None if values is None else change(values) for values in (self.denoised, self.outputs))
        return Trajectory(change(self.latents), change(self.log_probs), *others)

    def rows(self, start: int, stop: int) -> "Trajectory":
        """Samples `start` to `stop` as views of the same memory."""
        return self._each(lambda values: values[start:stop])

    def like(self, batch: int) -> "Trajectory":
        """Uninitialised buffers for `batch` samples of the same steps, shape and dtypes."""
        return self._each(lambda values: values.new_empty(batch, *values.shape[1:]))

    def put(self, start: int, other: "Trajectory", samples: Tensor) -> None:
        """Copies `samples` (int64 `[n]`) of another trajectory to the rows from `start` on."""
        rows = self.rows(start, start + len(samples))
        for ours, theirs in zip(vars(rows).values(), vars(other).values(), strict=True):
            if ours is not None:
                torch.index_select(theirs, 0, samples, out=ours)
