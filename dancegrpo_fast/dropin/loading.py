"""`--accelerate`: transformers that a script loads through diffusers get the block ops as they are made.

Imports neither torch nor diffusers before the script does.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MODES = ("lossless", "fast", "lossless:cpu", "fast:cpu")
# One a model: its class, the mode, whether the block ops are in, and why not.
RECORDS: list[dict[str, Any]] = []

# Where every way to load a model through diffusers builds it: `from_pretrained` of models and pipelines,
# `from_single_file` and `from_config` itself.
_WATCHED = "diffusers.configuration_utils"
_DENOISERS = ("Transformer", "UNet")


def check_mode(value: str) -> str:
    """A value of `--accelerate`.

    Raises:
        ValueError: it is not one of `MODES`.
    """
    if value not in MODES:
        raise ValueError(f'--accelerate: got "{value}", want one of {", ".join(MODES)}')
    return value


def install(mode: str, say: Callable[[str], None]) -> dict[str, Callable[[ModuleType], None]]:
    """What must be called after which module was executed, for the block ops to come in; nothing is imported for it.

    A model that the patch refuses is left as it is, with the reason in `RECORDS`. So is every model on a machine
    without CUDA, where the block ops cost time, unless the mode ends in ":cpu". A model that is built by a call of its
    class is not seen: give it to `dgf.accelerate`.

    Args:
        mode: one of `MODES`.
        say: gets a line for each new kind of outcome.

    Returns:
        Functions by the module that each waits for. One that was imported already is served at once.

    Raises:
        ValueError: an unknown mode.
    """
    check_mode(mode)
    said: set[str] = set()

    def tell(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    def follow(module: ModuleType) -> None:
        _follow(module.ConfigMixin, lambda model: _place(model, mode, tell))

    if _WATCHED in sys.modules:
        follow(sys.modules[_WATCHED])
    return {_WATCHED: follow}


def _follow(mixin: Any, place: Callable[[Any], None]) -> None:
    """Has `place` called with everything that this class's heirs make of a configuration."""
    original = mixin.from_config.__func__

    @functools.wraps(original)
    def from_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, *args, **kwargs)
        # With what was not used of the arguments, where that was asked for.
        place(made[0] if isinstance(made, tuple) else made)
        return made

    mixin.from_config = classmethod(from_config)


def _place(model: Any, mode: str, tell: Callable[[str], None]) -> None:
    """Puts the block ops into a denoiser, or says why not."""
    import torch

    name = type(model).__name__
    if not isinstance(model, torch.nn.Module) or not any(part in name for part in _DENOISERS):
        return
    rounding, _, on_cpu = mode.partition(":")
    reason = ""
    if on_cpu or torch.cuda.is_available():
        from ..patch import accelerate

        try:
            accelerate(model, rounding)
        except ValueError as error:
            reason = str(error)
    else:
        reason = (
            "there is no CUDA device, and on a CPU the block ops make a step 1.6 to 2.5 times as long"
            f" (--accelerate {rounding}:cpu puts them in)"
        )
    RECORDS.append({"class": name, "mode": rounding, "accepted": not reason, "reason": reason})
    tell(f"{name} is left as it is: {reason}" if reason else f"{name} runs on the block ops ({rounding})")
