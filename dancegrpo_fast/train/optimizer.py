"""The optimiser's step: gradients that were not made, clipping, AdamW; and its state by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import like, whole
from ..recipe import TrainSettings


class Optimizer:
    """AdamW on the trained parameters.

    Args:
        parameters: by name.
        train: its settings.
        keep_gradients: they are DDP's buckets, which stay.

    Attributes:
        adamw: torch's.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: TrainSettings, *, keep_gradients: bool) -> None:
        self._parameters, self._max_norm, self._keep = parameters, train.max_grad_norm, keep_gradients
        fused = all(parameter.is_cuda for parameter in parameters.values())
        self.adamw = torch.optim.AdamW(
            list(parameters.values()), lr=train.learning_rate, weight_decay=train.weight_decay, fused=fused
        )

    def step(self, changed: bool, learning_rate: float) -> Tensor:
        """Clips the gradients, steps and clears them; returns their norm before that, 0-dimensional.

        `changed` is False where no backward ran.
        """
        parameters = list(self._parameters.values())
        if not changed:
            # Skipping work must not skip the optimiser: its momentum moves on with a gradient of zero.
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=not self._keep)
        return whole(norm)

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's state as `<parameter>/<key>`."""
        return {
            f"{name}/{key}": torch.as_tensor(value)
            for name, parameter in self._parameters.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Puts back whole `tensors()`, or what gives parts of them when sliced.

        Raises:
            ValueError: they are of other parameters.
        """
        for key, stored in tensors.items():
            name, _, entry = key.rpartition("/")
            if name not in self._parameters:
                raise ValueError(
                    f"resume: the checkpoint holds optimiser state of {name}, which this model does not train"
                )
            parameter = self._parameters[name]
            value = like(stored, parameter) if stored.shape else stored[...]
            if stored.shape and value.is_floating_point():
                # An earlier version had LoRA layers and their states in bfloat16.
                value = value.to(torch.promote_types(value.dtype, parameter.dtype))
            elif self.adamw.defaults.get("fused"):
                # Its step counter is on the CPU otherwise.
                value = value.to(parameter.device)
            self.adamw.state[parameter][entry] = value
