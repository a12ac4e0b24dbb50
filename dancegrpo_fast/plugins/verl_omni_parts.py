"""What `plugins.verl_omni` puts into verl-omni, part by part, for a module of one's own under `external_lib`:

    from dancegrpo_fast.plugins import verl_omni_parts

    verl_omni_parts.step()
    verl_omni_parts.loss()

Rollout and actor need the same `step`, or old log-probabilities are another code's.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ._common import engine, is_taken, put_blocks, reader, say, stand_in
from ._packed import by_sample, is_packed

_WANTED = "verl-omni installed (github.com/verl-project/verl-omni)"
_SCHEDULER = "FlowMatchSDEDiscreteScheduler"
_LOSSES = ("flow_grpo", "dance_grpo")
_METRICS = ("ppo_kl", "pg_clipfrac", "pg_clipfrac_higher", "pg_clipfrac_lower", "ratio_mean", "ratio_std")
# Dots of a class's dotted name, within the one name that comes after ours.
_DOT = ":"


def _is_put(function: Any) -> bool:
    return getattr(function, "_is_ours", False) is True


def step() -> None:
    """Our step in the scheduler, here and in the processes that vLLM-Omni spawns; once is enough."""
    theirs = getattr(engine("verl_omni.pipelines.schedulers", _WANTED), _SCHEDULER)
    original = theirs.sample_previous_step
    if _is_put(original):
        return
    ours = stand_in(original, _SCHEDULER)
    parameters = inspect.signature(original)
    level, tokens = reader(original, "noise_level"), reader(original, "per_token_timesteps")

    @functools.wraps(original)
    def sample_previous_step(*args: Any, **kwargs: Any) -> Any:
        if tokens(args, kwargs) is not None:
            say(f"{_SCHEDULER}.sample_previous_step: per_token_timesteps go to verl-omni's own")
            return original(*args, **kwargs)
        if not isinstance(level(args, kwargs), Tensor):
            return ours(*args, **kwargs)
        call = parameters.bind(*args, **kwargs)
        call.apply_defaults()
        given = dict(call.arguments)
        if not is_packed(**given):
            say(f"{_SCHEDULER}.sample_previous_step: a tensor for noise_level in a replay goes to verl-omni's own")
            return original(*args, **kwargs)
        if not is_taken(original):
            # One level for all samples, scored: nothing is drawn, and the step is held against ours.
            ours(**given | {"noise_level": 0.5, "prev_sample": given["sample"]})
        return by_sample(**given) if is_taken(original) else original(*args, **kwargs)

    sample_previous_step._is_ours = True  # type: ignore[attr-defined]  # what _is_put reads
    theirs.sample_previous_step = sample_previous_step
    say(f"verl-omni: {_SCHEDULER}.sample_previous_step is held against our step at its first call")
    _in_spawned()


def _in_spawned() -> None:
    """vLLM-Omni's workers import a pipeline by its dotted name, and nothing else of ours: that name leads here."""
    base = engine("verl_omni.pipelines.model_base", _WANTED).VllmOmniPipelineBase
    original = base.get_pipeline_path.__func__
    if _is_put(original):
        return

    @functools.wraps(original)
    def get_pipeline_path(cls: Any, *args: Any, **kwargs: Any) -> str | None:
        path = original(cls, *args, **kwargs)
        return None if path is None else f"{__package__}.verl_omni.{path.replace('.', _DOT)}"

    get_pipeline_path._is_ours = True  # type: ignore[attr-defined]  # what _is_put reads
    base.get_pipeline_path = classmethod(get_pipeline_path)


def pipeline(name: str) -> Any:
    """The pipeline class whose path `get_pipeline_path` gave.

    Raises:
        AttributeError: another name.
    """
    module, _, cls = name.rpartition(_DOT)
    if not module:
        raise AttributeError(f"module '{__package__}.verl_omni' has no attribute {name!r}")
    return getattr(engine(module.replace(_DOT, "."), _WANTED), cls)


def loss() -> None:
    """Our clipped loss under "flow_grpo" and "dance_grpo": the same numbers, one host read instead of six."""
    algorithms = engine("verl_omni.trainer.diffusion.diffusion_algos", _WANTED)
    put = []
    for name in _LOSSES:
        theirs = type(algorithms.DIFFUSION_LOSS_REGISTRY.get(name))
        if _is_put(theirs):
            continue
        if theirs is not algorithms.FlowGRPOLoss:
            say(f'verl-omni: the loss "{name}" stays, got a {theirs.__module__}.{theirs.__qualname__}')
            continue
        members = {"compute_loss": staticmethod(compute_loss), "_is_ours": True, "__module__": __name__}
        algorithms.register_diffusion_loss(name)(type("FlowGRPOLoss", (theirs,), members))
        put.append(f'"{name}"')
    if put:
        say(f"verl-omni: our loss as {', '.join(put)}")


def compute_loss(
    *, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, config: Any, rollout_is_weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """`mean(weight max(-A rho, -A clip(rho, 1 - c, 1 + c)))` and its metrics, as verl-omni defines them.

    Args:
        old_log_prob, log_prob, advantages: `[B]`; differentiable in `log_prob`.
        config: of the actor; `diffusion_loss` has `clip_ratio` and `adv_clip_max`.
        rollout_is_weights: `[B]`, factors of each sample's loss.
    """
    clip, limit = config.diffusion_loss.clip_ratio, config.diffusion_loss.adv_clip_max
    gain = -advantages.clamp(-limit, limit)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    each = torch.maximum(gain * ratio, gain * ratio.clamp(1.0 - clip, 1.0 + clip))
    if rollout_is_weights is not None:
        each = each * rollout_is_weights.detach()
    with torch.no_grad():
        above, below = ratio - 1.0 > clip, 1.0 - ratio > clip
        parts = torch.stack([-log_ratio, above | below, above, below, ratio]).mean(dim=1)
        found = torch.cat([parts, ratio.std().reshape(1)]).tolist()
    return each.mean(), {f"actor/{name}": value for name, value in zip(_METRICS, found, strict=True)}


def blocks(mode: str = "lossless") -> None:
    """Block ops in every transformer that verl-omni's FSDP engine builds, before LoRA and FSDP.

    Args:
        mode: "lossless" or "fast".
    """
    theirs = engine("verl_omni.workers.engine.fsdp.diffusers_impl", _WANTED).DiffusersFSDPEngine
    original = theirs._build_module
    if _is_put(original):
        return

    @functools.wraps(original)
    def _build_module(self: Any) -> nn.Module:
        module: nn.Module = original(self)
        put_blocks(module, mode, "verl-omni")
        return module

    _build_module._is_ours = True  # type: ignore[attr-defined]  # what _is_put reads
    theirs._build_module = _build_module
