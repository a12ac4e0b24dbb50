"""The protocol of an objective: which pairs of sample and step an update looks at, and their loss."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ..calls import Inputs, Item, Policy
from ..collect import Batch
from ..trajectory import Trajectory

# By name: "model_output" `[n, ...]`, "uncond_output" (None without guidance), and what `Loss.others` adds.
Outputs = Mapping[str, Tensor | None]


class Term(NamedTuple):
    """The loss of n rows of a model call; only `loss` is differentiable.

    Attributes:
        loss: 0-dimensional, weighted: the terms of an update add up.
        samples: 0-dimensional, how many samples count in the metrics.
        metrics: 0-dimensional means over these, by the names in `Loss.metrics`.
        ratio_max_dev: 0-dimensional, the largest `|ratio - 1|`; None for a loss without a ratio.
        has_grad: bool `[n]`, False where the gradient is known to be zero.
        moved: int64 `[n]` steps, and float32 `[n]` how far their log-probabilities are from those when sampled; None
            for a loss without.
    """

    loss: Tensor
    samples: Tensor
    metrics: Mapping[str, Tensor]
    ratio_max_dev: Tensor | None
    has_grad: Tensor
    moved: tuple[Tensor, Tensor] | None = None


class Sampled(Protocol):
    """Samples, before or after there are rewards."""

    @property
    def trajectory(self) -> Trajectory:
        """Of n samples."""
        ...

    @property
    def own_advantages(self) -> Tensor:
        """float32 `[n]`."""
        ...


class Loss(Protocol):
    """An objective. The update asks for pairs, packs them into model calls, and runs backward through their terms.

    A pair is a sample of the batch and a `step`: of its trajectory, or for a loss on noised samples the number of a
    draw of time and noise, which `inputs` makes anew from it.

    Attributes:
        keeps_outputs: trajectories have to keep the model's outputs.
        pairs_per_sample: how many pairs every sample has; the loss is a mean over those of all processes.
        metrics: names of the means in its terms.
    """

    keeps_outputs: bool
    pairs_per_sample: int
    metrics: Sequence[str]

    def steps(self, number: int) -> Sequence[int]:
        """The steps whose pairs the sample with this number in the run has, where pairs are of its trajectory."""
        ...

    def pairs(self, batch: Batch, samples: Sequence[int]) -> list[Item]:
        """What an update replays of `samples` (of this process); a pair whose gradient is zero may be left out.

        Neighbours with rows 0, 1, 2, ... stay neighbours in a call, so that one may be the other's partner.
        """
        ...

    def inputs(self, batch: Batch, samples: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[n, ...]` and times float32 `[n]` of a model call for pairs of int64 `[n]`."""
        ...

    def others(self, policy: Policy, denoiser: nn.Module, inputs: Inputs) -> Outputs:
        """What other models (a reference, an older policy) make of a call's inputs, without gradient."""
        ...

    def term(
        self, batch: Sampled, samples: Tensor, steps: Tensor, outputs: Outputs, weight: float, guidance_scale: float
    ) -> Term:
        """`weight` times the mean loss of pairs of int64 `[n]`, from what the models made of their inputs.

        `guidance_scale` is that of the denoiser that the pairs are for.
        """
        ...
