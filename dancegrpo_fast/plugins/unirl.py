"""UniRL's SDE strategies (Tencent-Hunyuan/UniRL, `unirl/sde/kernels.py`) on our ops, by Hydra's `_target_`.

`FlowSDEStrategy`, `DanceSDEStrategy` and `CPSSDEStrategy` are made when they are asked for, each from UniRL's own.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ._common import engine, say
from ._rows import rows, transition

_KINDS = {"FlowSDEStrategy": "flow", "DanceSDEStrategy": "dance", "CPSSDEStrategy": "cps"}
# Below it UniRL neither adds noise nor scores.
_LEAST_ETA = 1e-7


def __getattr__(name: str) -> Any:
    if name not in _KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, want one of {', '.join(_KINDS)}")
    theirs = getattr(engine("unirl.sde.kernels", "UniRL on the path (github.com/Tencent-Hunyuan/UniRL)"), name)
    members = {"__module__": __name__, "__qualname__": name, "denoise": _denoise(theirs, _KINDS[name])}
    made = type(name, (theirs,), {**members, "__doc__": f"UniRL's {name} with our step."})
    globals()[name] = made
    return made


def _denoise(theirs: type, kind: str) -> Any:
    original: Any = theirs.denoise  # type: ignore[attr-defined]  # a strategy

    @functools.wraps(original)
    def denoise(
        self: Any,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        sigma_max: float | Tensor = 0.99,
        step_index: int = 0,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        reason = _not_ours(kind, noise_pred, sample, sigma, sigma_next, eta, others)
        if reason is not None:
            if reason:
                say(f"{theirs.__name__}.denoise: a call with {reason} goes to UniRL's own")
            settings = {"eta": eta, "prev_sample": prev_sample, "sigma_max": sigma_max, "step_index": step_index}
            found: Any = original(self, noise_pred, sample, sigma, sigma_next, **settings, **others)
            return found  # type: ignore[no-any-return]  # theirs
        say(f"{theirs.__name__}.denoise: our step")
        return _transition(noise_pred, sample, rows(kind, sigma, sigma_next, eta, sigma_max), prev_sample)

    return denoise


def _not_ours(
    kind: str, noise_pred: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, eta: Any, others: dict[str, Any]
) -> str | None:
    """Why a call is not computed here, empty for a step without noise; None for one that is."""
    if isinstance(eta, Tensor):
        return "a tensor for eta"
    if eta < _LEAST_ETA:
        return ""
    if kind == "cps" and eta > 1:
        return "eta above 1"
    if others:
        return f"the argument {', '.join(others)}"
    one_each = sigma.numel() == 1 or (sigma.numel() == len(sigma) == len(sample))
    if not one_each or sigma.shape != sigma_next.shape:
        return f"sigmas of shape {tuple(sigma.shape)} and {tuple(sigma_next.shape)}"
    if noise_pred.shape != sample.shape or sample.ndim < 2 or sample.numel() == 0:
        return f"an output of shape {tuple(noise_pred.shape)} for latents of {tuple(sample.shape)}"
    return None


def _transition(
    noise_pred: Tensor, sample: Tensor, packed: Tensor, prev_sample: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(prev_sample, log_prob [B], mean)`, float32; sampled or given, it is rounded to the latents' dtype first."""
    output = noise_pred.float()
    latents = sample.float() if sample.dtype == torch.float64 else sample
    if prev_sample is not None:
        return transition(latents, output, packed, prev_sample.float().to(sample.dtype).float(), None)
    return transition(latents, output, packed, None, torch.randn(output.shape, device=output.device))
