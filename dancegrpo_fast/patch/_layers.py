"""Which layers of a block are computed without calling them, decided in every call: plain ones, and peft's LoRA."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as nn_module

from ._fingerprints import fingerprint

# Quantised and distributed weights are other classes; fake ones stand for plain ones.
PLAIN: tuple[type, ...] = (nn.Parameter, Tensor, FakeTensor)
# Where torch keeps those of a module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of `Linear.forward` in peft 0.18 to 0.21.
_PEFT = "peft.tuners.lora.layer"
_KNOWN = "afd84aca60c7cf03"


class Adapted(NamedTuple):
    """What `lora_linear` takes beside x and the mode."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is no more than its class's forward."""
    # Found in Python where they are asked of the module, and this in every call.
    own = vars(module)
    return "forward" not in own and not any(own[name] for name in HOOKS)


def is_plain_linear(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer's product may be computed without calling it."""
    if type(layer) is not nn.Linear or not unhooked(layer):
        return False
    return all(type(p) in PLAIN and p.dtype == dtype for p in (layer.weight, layer.bias) if p is not None)


@functools.cache
def _is_known(forward: Callable[..., Any]) -> bool:
    try:
        found = fingerprint(forward)
    except (OSError, TypeError):
        found = "no source"
    if found != _KNOWN:
        warnings.warn(
            f"{_PEFT}.Linear.forward is not the code of peft 0.18 to 0.21: LoRA layers run as peft has them",
            stacklevel=2,
        )
    return found == _KNOWN


def adapted(layer: Any, x: Tensor) -> Adapted | None:
    """The parts of peft's layer where it adds one plain update to one plain product, else None: it is called then.

    So are layers of other classes (nf4, int8), with DoRA, dropout, biases of their own, hooks, several active adapters,
    merged or disabled ones, and all under autocast or in a compiled graph, which fuses peft's operations by itself.
    """
    kind = type(layer)
    if kind.__name__ != "Linear" or kind.__module__ != _PEFT or torch.compiler.is_compiling():
        return None
    if (
        layer.disable_adapters
        or layer.merged
        or torch.is_autocast_enabled(x.device.type)
        or not _is_known(kind.forward)
    ):
        return None
    parts = vars(layer)["_modules"]
    downs = vars(parts["lora_A"])["_modules"]
    names = [name for name in layer.active_adapters if name in downs]
    if len(names) != 1 or names[0] in layer.lora_variant or not layer.cast_input_dtype_enabled:
        return None
    base, down = parts["base_layer"], downs[names[0]]
    up, dropout = (vars(parts[key])["_modules"][names[0]] for key in ("lora_B", "lora_dropout"))
    idle = isinstance(dropout, nn.Identity) or (type(dropout) is nn.Dropout and not (dropout.p and dropout.training))
    if not idle or not unhooked(layer) or not unhooked(dropout) or nn_module._has_any_global_hook():
        return None
    dtype = down.weight.dtype
    if not is_plain_linear(base, x.dtype) or not is_plain_linear(down, dtype) or not is_plain_linear(up, dtype):
        return None
    if down.bias is not None or up.bias is not None:
        return None
    return Adapted(base.weight, base.bias, down.weight, up.weight, layer.scaling[names[0]])
