"""Denoisers of classes that are not known: what their forward is called with, guessed and tried on fake tensors."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..trace.tracer import trace
from .families import Call, Family

# What a call with the wrong inputs raises, or one on fake tensors whose control flow asks for values.
FAILURES = (
    *(TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError),
    *(NotImplementedError, ZeroDivisionError, ImportError, NameError),
)
_TIMES = {"timestep", "timesteps", "t"}
# Of a prompt, where nothing says how long it is.
TEXT = 512
# What configurations call the width of text embeddings, the most telling first.
WIDTHS = (
    *("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim", "text_hidden_dim"),
    *("encoder_hidden_states_dim", "context_dim", "text_in_dim", "in_context_channels", "cross_attention_dim"),
)


def is_denoiser(cls: Any) -> bool:
    """Whether it is a model of diffusers whose blocks can be checkpointed and that takes latents and times."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return False
    made, called = (inspect.signature(inspect.unwrap(f)).parameters for f in (cls.__init__, cls.forward))
    checkpoints = bool(getattr(cls, "_supports_gradient_checkpointing", False))
    return checkpoints and "in_channels" in made and not _TIMES.isdisjoint(called)


def family(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Family:
    """What is assumed: latents packed two by two where the denoiser has four times the VAE's channels."""
    latents = vae.get("latent_channels") or vae.get("z_dim")
    packed = latents is not None and config["in_channels"] == 4 * latents
    video = "temporal_compression_ratio" in vae or "temperal_downsample" in vae
    return Family(_nothing, TEXT, (4 if video else 1, 8, 8), packed=packed)


def _nothing(_: Call) -> dict[str, Any]:
    return {}


def _text(call: Call) -> Tensor:
    width = next((call.config[key] for key in WIDTHS if isinstance(call.config.get(key), int)), None)
    if width is None:
        raise ValueError(f"no width of text embeddings among {', '.join(WIDTHS)}")
    return call.floats(call.text, width)


def _axes(call: Call) -> int:
    return len(call.config.get("axes_dims_rope") or call.config.get("axes_dim") or (0, 0, 0))


def _control(call: Call) -> Tensor:
    return call.floats(call.config["vace_in_channels"], *call.grid)


def _sizes(call: Call) -> dict[str, Any]:
    return {"resolution": call.floats(2), "aspect_ratio": call.floats(1)}


_GIVEN: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys((*_TIMES, "r_timestep"), Call.times),
    **dict.fromkeys(("encoder_hidden_states", "context", "cap_feats"), _text),
    **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states_mask"), Call.mask),
    **dict.fromkeys(("original_size", "target_size", "crop_coords"), lambda call: call.floats(2)),
    "pooled_projections": lambda call: call.floats(call.config["pooled_projection_dim"]),
    "img_ids": lambda call: call.ids(call.packed(), _axes(call)),
    "txt_ids": lambda call: call.ids(call.text, _axes(call)),
    "guidance": Call.times,
    "num_frames": lambda call: call.grid[0],
    "height": lambda call: call.grid[1],
    "width": lambda call: call.grid[2],
    "added_cond_kwargs": _sizes,
    "control_hidden_states": _control,
}
_LATENTS = ("hidden_states", "sample", "x", "latents")
# Arguments that go with something in the configuration.
_WITH = {"guidance": "guidance_embeds", "pooled_projections": "pooled_projection_dim"}


def _inputs(call: Call, latents: Callable[[Call], Tensor]) -> dict[str, Any]:
    """By the names of forward's parameters.

    Raises:
        ValueError: one without a default that has no guess.
    """
    import diffusers

    given: dict[str, Any] = {}
    unknown: list[str] = []
    takes = inspect.signature(inspect.unwrap(getattr(diffusers, call.spec.denoiser).forward)).parameters
    for name, parameter in takes.items():
        if name in _LATENTS:
            given[name] = latents(call)
        elif name in _WITH and not call.config.get(_WITH[name]):
            continue
        elif name in _GIVEN:
            given[name] = _GIVEN[name](call)
        elif parameter.default is parameter.empty and name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            unknown.append(name)
    if unknown:
        raise ValueError(f"nothing is known of its {', '.join(unknown)}")
    return given


def _picture(call: Call) -> Tensor:
    if call.grid[0] > 1:
        raise ValueError("a clip has frames")
    return call.volume().squeeze(2)


def _tokens(call: Call) -> Tensor:
    count = call.packed() if call.spec.family.packed else call.grid[0] * call.grid[1] * call.grid[2]
    return call.floats(count, call.config["in_channels"])


# In this order.
LAYOUTS: dict[str, Callable[[Call], dict[str, Any]]] = {
    "[B, C, H, W]": lambda call: _inputs(call, _picture),
    "[B, C, T, H, W]": lambda call: _inputs(call, Call.volume),
    "[B, T, C, H, W]": lambda call: _inputs(call, lambda call: call.volume().transpose(1, 2).contiguous()),
    "[B, tokens, C]": lambda call: _inputs(call, _tokens),
}


def run(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Calls a model on fake tensors; raises what it raises."""
    trace(model, given, train=False)


def runs(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether that works."""
    try:
        run(model, given)
    except FAILURES:
        return False
    return True


def words(denoiser: str, layout: str, given: Mapping[str, Any]) -> str:
    """What was assumed of a class."""
    names = ", ".join(name for name, value in given.items() if isinstance(value, Tensor))
    return (
        f"{denoiser} has no specification: assumed to be called with {names}, latents as {layout}, {TEXT} tokens of "
        "text unless text_tokens says otherwise, and guided by a second row"
    )


class _Valid(TorchFunctionMode):
    """Inside, masks of tokens are valid throughout: picking by one gives all tokens, and by its negation none."""

    def __init__(self) -> None:
        super().__init__()
        self.negations: list[Tensor] = []
        self.length = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return False
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            rows = args[0].flatten(0, args[1].ndim - 1)
            return rows[:0] if any(args[1] is mask for mask in self.negations) else rows
        if func is Tensor.item and self.length and not args[0].is_floating_point():
            # What is read of such tensors are prompts' lengths.
            return self.length
        if func is Tensor.tolist and self.length and not args[0].is_floating_point():
            return [self.length] * len(args[0])
        found = func(*args, **(kwargs or {}))
        if func is Tensor.__invert__:
            self.negations.append(found)
        if func is Tensor.sum and args[0].ndim == 2:
            self.length = args[0].shape[1]
        return found


def count_masked(model: nn.Module) -> None:
    """Lets a model's forward run on fake tensors whose masks it picks tokens by; none counts as padding."""
    forward = model.forward

    def whole(*args: Any, **kwargs: Any) -> Any:
        with _Valid():
            return forward(*args, **kwargs)

    model.forward = whole
