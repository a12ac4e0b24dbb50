"""An exponential moving average of the trained parameters, of each process's shard where they are split."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..shards import like, local


class MovingAverage:
    """`average <- decay average + (1 - decay) parameter`, in float32.

    Args:
        parameters: by name.
        weights: what is averaged, by the same names: the parameters or their masters; the average starts at them.
        decay: in (0, 1).

    Attributes:
        values: averages by name, split as the parameters are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], decay: float) -> None:
        self._parameters, self._weights, self._decay = parameters, weights, decay
        self.values = {name: w.detach().to(torch.float32, copy=True) for name, w in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step after the optimiser's."""
        for name, weight in self._weights.items():
            local(self.values[name]).lerp_(local(weight.detach()).float(), 1 - self._decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Any]) -> None:
        """Puts back whole averages, or what gives parts of them when sliced.

        Raises:
            ValueError: they are of other parameters.
        """
        if values.keys() != self._parameters.keys():
            raise ValueError("resume: the checkpoint holds averages of other parameters than this model trains")
        for name, value in values.items():
            local(self.values[name]).copy_(local(like(value, self._parameters[name])))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for parameters inside."""
        kept = {name: local(parameter.detach()).clone() for name, parameter in self._parameters.items()}
        averages = {name: local(value) for name, value in self.values.items()}
        try:
            self._copy(averages)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter.detach()).copy_(values[name])
