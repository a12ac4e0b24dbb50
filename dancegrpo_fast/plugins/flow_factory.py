"""Flow-Factory (X-GenGroup/Flow-Factory) on our ops: accelerators, schedulers and model adapters for its YAML.

Every name here is a dotted path of Flow-Factory's configuration, and its class is made when it is asked for:

- `Step`, `Blocks`, `Checkpointing`: entries of `acceleration.shared`.
- `FlowMatchEulerDiscreteSDEScheduler`, `UniPCMultistepSDEScheduler`: its schedulers with our step.
- any name of its own registry (`flux1`, `sd3-5`, ...): that adapter with step and blocks, as `model.model_type`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import checkpointing
from ._common import engine, put_blocks, reader, say, stand_in

_SCHEDULERS = {
    "FlowMatchEulerDiscreteSDEScheduler": "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepSDEScheduler": "UniPCMultistepScheduler",
}
_WANTED = "Flow-Factory installed (github.com/X-GenGroup/Flow-Factory)"


def __getattr__(name: str) -> Any:
    if name in _SCHEDULERS:
        made = _scheduler(name)
    elif name in ("Step", "Blocks", "Checkpointing"):
        made = _accelerator(name)
    else:
        try:
            made = _adapter(name)
        except ImportError as error:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from error
    globals()[name] = made
    return made


def _named(name: str, base: type, members: dict[str, Any]) -> type:
    """A subclass that pickles by this module's name."""
    return type(name, (base,), {"__module__": __name__, "__qualname__": name, **members})


# Schedulers


def _scheduler(name: str) -> type:
    theirs = getattr(engine("flow_factory.scheduler", _WANTED), name)
    return _named(name, theirs, {"step": _step(theirs), "__doc__": "Flow-Factory's scheduler with our step."})


def _step(theirs: type) -> Callable[..., Any]:
    original: Callable[..., Any] = theirs.step  # type: ignore[attr-defined]  # a scheduler
    ours = stand_in(original, theirs.__name__)
    scored, as_dict, kept, level, at, after = (
        reader(original, name)
        for name in ("compute_log_prob", "return_dict", "return_kwargs", "noise_level", "timestep", "timestep_next")
    )

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = (self, *args)
        # What is neither scored nor compared as a mean may lie off the schedule (NFT, AWM, DGPO, DPO).
        wants_mean = not as_dict(call, kwargs) or "next_latents_mean" in kept(call, kwargs)
        if self.is_eval or not (scored(call, kwargs) or wants_mean):
            return original(*call, **kwargs)
        reason = _several_levels(level(call, kwargs)) or _off_schedule(self, at(call, kwargs), after(call, kwargs))
        if reason is not None:
            say(f"{theirs.__name__}.step: a call with {reason} goes to Flow-Factory's own")
            return original(*call, **kwargs)
        return ours(*call, **kwargs)

    return step


def _several_levels(level: Any) -> str | None:
    if not isinstance(level, Tensor) or (level.device.type == "cpu" and len(set(level.flatten().tolist())) == 1):
        return None
    return "a noise level for each sample"


def _off_schedule(scheduler: Any, at: Any, after: Any) -> str | None:
    """Numbers on the host can be looked up without waiting for a device."""
    if after is None or any(isinstance(time, Tensor) and time.device.type != "cpu" for time in (at, after)):
        return None
    times = scheduler.timesteps.cpu()
    steps = torch.stack([times, torch.cat([times[1:], times.new_zeros(1)])], dim=1)
    pairs = torch.stack(
        torch.broadcast_tensors(*(torch.as_tensor(t, dtype=times.dtype).reshape(-1) for t in (at, after))), dim=1
    )
    there = (pairs[:, None] == steps).all(dim=2).any(dim=1)
    return None if bool(there.all()) else "timesteps that do not follow each other in the schedule"


def register() -> None:
    """Makes Flow-Factory build our schedulers; before an adapter is made."""
    scheduler = engine("flow_factory.scheduler", _WANTED)
    for name, diffusers_name in _SCHEDULERS.items():
        scheduler.register_scheduler(diffusers_name, f"{__name__}.{name}")


# Model adapters


def _adapter(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registry = engine("flow_factory.models.registry", _WANTED)
    if name not in registry.list_registered_models():
        known = ", ".join([*_SCHEDULERS, "Step", "Blocks", "Checkpointing", *registry.list_registered_models()])
        raise AttributeError(f"{__name__}: got {name}, want one of {known}")
    theirs: Any = registry.get_model_adapter_class(name)

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        register()
        theirs.__init__(self, *args, **kwargs)
        say(f"{name}: a {type(self.scheduler).__module__}.{type(self.scheduler).__name__}")
        for part in self.transformer_names:
            put_blocks(self._unwrap(self.get_component(part)), "lossless", f"{name}, {part}")

    return _named(name, theirs, {"__init__": start, "__doc__": f"{theirs.__name__} with our step and block ops."})


# Accelerators


def _accelerator(name: str) -> type:
    wanted = f"a {_WANTED} that has accelerators (mid-2026 on), or model_type: {__name__}.<its model type>"
    base = engine("flow_factory.acceleration.abc", wanted).BaseAccelerator
    setup = {"Step": _setup_step, "Blocks": _setup_blocks, "Checkpointing": _setup_checkpointing}[name]
    # As Flow-Factory means it: the same bits in rollout and training.
    return _named(name, base, {"safety": "lossless", "stage": "both", "setup": setup, "__doc__": setup.__doc__})


def _setup_step(self: Any, adapter: Any) -> None:
    """Our step in the adapter's scheduler. No parameters."""
    _check(self, ())
    name = type(adapter.scheduler).__name__
    if name not in _SCHEDULERS or type(adapter.scheduler).__module__ == __name__:
        raise ValueError(f"Step: got a {type(adapter.scheduler)}, want one of Flow-Factory's {', '.join(_SCHEDULERS)}")
    # The object stays, as others hold it.
    adapter.scheduler.__class__ = __getattr__(name)
    say(f"Step: our step in a {name}")


def _setup_blocks(self: Any, adapter: Any) -> None:
    """Block ops in the adapter's transformers. Parameters: mode, "lossless" (default) or "fast"."""
    _check(self, ("mode",))
    mode = self.params.get("mode", "lossless")
    parts = {part: adapter._unwrap(adapter.get_component(part)) for part in adapter.transformer_names}
    reasons = [put_blocks(model, mode, f"Blocks, {part}") for part, model in parts.items()]
    if None not in reasons:
        raise ValueError(
            f"Blocks: {'; '.join(map(str, reasons)) or 'got an adapter without transformers'}; under FSDP want"
            f" model_type: {__name__}.<its model type>, which patches before it is sharded"
        )


def _setup_checkpointing(self: Any, adapter: Any) -> None:
    """What each block recomputes. Parameters: policy ("auto", or as for `memory.checkpointing.apply`), offload,
    memory_gib (of the device), model_name (as the planner knows it) and frames."""
    _check(self, ("policy", "offload", "memory_gib", "model_name", "frames"))
    params = dict(self.params)
    policy, offload = params.pop("policy", "auto"), params.pop("offload", False)
    for part in adapter.transformer_names:
        model, chosen, host = adapter._unwrap(adapter.get_component(part)), policy, offload
        reasons: tuple[str, ...] = (policy,)
        if policy == "auto":
            from ..memory.planning.automatic import automatic
            from ..memory.planning.iteration import Iteration
            from ..memory.trace.tracer import collected
            from ._planned import settings_of

            with collected():
                chosen, host, reasons = automatic(Iteration(settings_of(adapter, part, model, **params)))
        elif policy.startswith("first:"):
            chosen = checkpointing.FirstBlocks(int(policy.removeprefix("first:")))
        checkpointing.apply(model, chosen, offload=host)
        say(f"Checkpointing, {part}: {'; '.join(reasons)}")


def _check(accelerator: Any, known: tuple[str, ...]) -> None:
    if unknown := sorted(accelerator.params.keys() - set(known)):
        raise ValueError(f"params: got {', '.join(unknown)}, want {'none' if not known else ', '.join(known)}")
