"""The optimiser's step: gradients that were not made, clipping, AdamW; and its state by name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..processes import like, whole
from ..recipe import TrainSettings


class Optimizer:
    """AdamW on the trained parameters.

    Args:
        names: of the parameters.
        train: its settings.
        keep_gradients: they are DDP's buckets, which stay.

    Attributes:
        adamw: torch's.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], train: TrainSettings, *, keep_gradients: bool) -> None:
        self._names, self._max_norm, self._keep = names, train.max_grad_norm, keep_gradients
        fused = all(parameter.is_cuda for parameter in names)
        self.adamw = torch.optim.AdamW(
            list(names), lr=train.learning_rate, weight_decay=train.weight_decay, fused=fused
        )

    def step(self, changed: bool) -> Tensor:
        """Clips the gradients, steps and clears them; returns their norm before that, 0-dimensional.

        `changed` is False where no backward ran.
        """
        if not changed:
            # Skipping work must not skip the optimiser: its momentum moves on with a gradient of zero.
            for parameter in self._names:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(list(self._names), self._max_norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=not self._keep)
        return whole(norm)

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's state as `<parameter>/<key>`."""
        return {
            f"{name}/{key}": torch.as_tensor(value)
            for parameter, name in self._names.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back whole `tensors()`.

        Raises:
            ValueError: they are of other parameters.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            if name not in parameters:
                raise ValueError(
                    f"resume: the checkpoint holds optimiser state of {name}, which this model does not train"
                )
            parameter = parameters[name]
            if value.ndim == 0:
                # AdamW keeps its step counter on the CPU unless it is fused.
                there = value.to(parameter.device) if self.adamw.defaults.get("fused") else value
            else:
                there = like(value, parameter)
            self.adamw.state[parameter][entry] = there
