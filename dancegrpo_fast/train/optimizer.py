"""The optimiser's step: gradients that were not made, clipping, float32 masters; and its state by name."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizers import ADAMW, changed_settings, make_optimizer, probe
from ..recipe import TrainSettings
from ..shards import like, whole

LOSS_SCALE = 2.0**16  # a power of two: nothing but the range of gradients changes
SCALE_NAME = "/loss_scale"  # among the optimiser's tensors


class Optimizer:
    """The recipe's optimiser on the trained parameters.

    Args:
        parameters: by name.
        train: its settings.
        keep_gradients: they are DDP's buckets, which stay.
        scaled: losses are multiplied by `loss_scale`, as gradients pass through float16.

    Attributes:
        torch: the optimiser itself.
        weights: what it steps, by name: the parameters, or with `train.master_dtype` float32 masters, of which narrower
            parameters are the rounding.
        loss_scale: 1 where nothing is scaled.

    Raises:
        ValueError: the optimiser does not take these parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        train: TrainSettings,
        *,
        keep_gradients: bool,
        scaled: bool = False,
    ) -> None:
        self._parameters, self._max_norm, self._keep = parameters, train.max_grad_norm, keep_gradients
        self._scaled, self.loss_scale = scaled, LOSS_SCALE if scaled else 1.0
        self.weights = dict(parameters)
        if train.master_dtype is not None:
            self.weights |= {n: nn.Parameter(p.detach().float()) for n, p in parameters.items() if p.itemsize < 4}
        more: dict[str, Any] = {}
        if train.optimizer == ADAMW and not train.optimizer_args.keys() & {"fused", "foreach"}:
            more["fused"] = all(parameter.is_cuda for parameter in parameters.values())
        self.torch = make_optimizer(train, self.weights.values(), **more)
        self._kept = probe(train)
        # Of a parameter group: some optimisers keep what they learn of all tensors there.
        self._settings = dict(self.torch.param_groups[0])

    def step(self, changed: bool, learning_rate: float) -> Tensor | None:
        """Clips the gradients, steps and clears them; returns their norm before that, 0-dimensional.

        None where scaled gradients are not finite: they are cleared, `loss_scale` is halved, and nothing else is done,
        in every process. At a scale of 1 they are taken as they are.

        `changed` is False where no backward ran.
        """
        if not changed:
            # Skipping work must not skip the optimiser: its momentum moves on with a gradient of zero.
            for parameter in self._parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        self._widen_gradients()
        if self._scaled:
            self._unscale_gradients()
        norm = whole(torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self._max_norm))
        # The host waits here in float16 alone: whether to step is decided by it, as torch's scaler does.
        if self.loss_scale > 1 and not norm.isfinite():
            self.loss_scale /= 2
            self.torch.zero_grad(set_to_none=not self._keep)
            return None
        for group in self.torch.param_groups:
            group["lr"] = learning_rate
        self.torch.step()
        self.torch.zero_grad(set_to_none=not self._keep)
        self.round_masters()
        return norm

    def _widen_gradients(self) -> None:
        """Hands gradients of narrow parameters to their masters."""
        for name, parameter in self._parameters.items():
            master = self.weights[name]
            if master is parameter or parameter.grad is None:
                continue
            master.grad = parameter.grad.float()
            if self._keep:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def _unscale_gradients(self) -> None:
        for weight in self.weights.values():
            if weight.grad is not None:
                weight.grad /= self.loss_scale

    @torch.no_grad()
    def round_masters(self) -> None:
        """Writes masters into their parameters."""
        for name, parameter in self._parameters.items():
            if self.weights[name] is not parameter:
                parameter.copy_(self.weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as `<weight>/<key>`, as `/<key>` what it changed of its settings, and `loss_scale`."""
        found = {
            f"{name}/{key}": _stored(value)
            for name, weight in self.weights.items()
            for key, value in self.torch.state.get(weight, {}).items()
        }
        changed = changed_settings(self._settings, self.torch.param_groups[0])
        found |= {f"/{key}": _stored(value) for key, value in changed.items()}
        return found | ({SCALE_NAME: _stored(self.loss_scale)} if self._scaled else {})

    def fits(self, names: Collection[str]) -> bool:
        """Whether `tensors()` with these names are what it would keep itself, as far as that is known."""
        kept = {name.rpartition("/")[2] for name in names if not name.startswith("/")}
        return self._kept.names is None or kept == self._kept.names

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Puts back whole `tensors()`, or what gives parts of them when sliced.

        Raises:
            ValueError: they are of other parameters.
        """
        for key, stored in tensors.items():
            name, _, entry = key.rpartition("/")
            if key == SCALE_NAME:
                self.loss_scale = float(stored[...]) if self._scaled else 1.0
            elif not name:
                self._load_setting(entry, stored[...])
            elif name not in self.weights:
                raise ValueError(
                    f"resume: the checkpoint holds optimiser state of {name}, which this model does not train"
                )
            else:
                self.torch.state[self.weights[name]][entry] = self._loaded(entry, stored, self.weights[name])

    def _loaded(self, entry: str, stored: Any, weight: Tensor) -> Any:
        if entry in self._kept.numbers:
            # Of a checkpoint on the host, once, at resume.
            return self._kept.numbers[entry](stored[...].item())
        if stored.shape and tuple(stored.shape) == weight.shape:
            value = like(stored, weight)
            if isinstance(self.torch, torch.optim.AdamW):
                # An earlier version had LoRA layers and their states in bfloat16.
                value = value.to(torch.promote_types(value.dtype, weight.dtype))
            return value
        # torch's own step counters are on the CPU otherwise.
        stays = entry == "step" and not self.torch.defaults.get("fused") and not self.torch.defaults.get("capturable")
        return stored[...] if stays else stored[...].to(weight.device)

    def _load_setting(self, entry: str, value: Tensor) -> None:
        old = self._settings.get(entry)
        # On the host too, once, at resume.
        found = value.to(old.device) if isinstance(old, Tensor) else value.item()
        for group in self.torch.param_groups:
            group[entry] = found


def _stored(value: Any) -> Tensor:
    """A tensor as it is, a number with all of its bits."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=_WIDE[type(value)])


_WIDE = {bool: torch.bool, int: torch.int64, float: torch.float64}
