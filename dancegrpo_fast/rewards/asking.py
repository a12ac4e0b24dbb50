"""A reward asked for its scores, and what becomes of samples that it cannot score."""

import warnings

import torch
from torch import Tensor

from ..recipe import RewardSettings
from .base import Reward, RewardInput, UnscoredError


def ask(reward: Reward, settings: RewardSettings, inputs: RewardInput) -> Tensor:
    """Scores float32 `[B]` on the CPU; NaN for a sample that is dropped.

    Where samples of a group are compared, its whole group is asked for again.

    Raises:
        RuntimeError: the reward returned something other than B floats, or did not score a sample that `on_error` does
            not drop.
    """
    row, reasons, error = _once(reward, settings.name, inputs)
    if reasons and settings.on_error != "stop":
        failed = torch.zeros(len(row), dtype=torch.bool)
        failed[list(reasons)] = True
        if getattr(reward, "compares_groups", False):
            failed = torch.isin(inputs.group.cpu(), inputs.group.cpu()[failed])
        places = failed.nonzero().flatten().tolist()
        again, missing, error = _once(reward, settings.name, inputs.of(places))
        row[places] = again
        reasons = {places[place]: reason for place, reason in missing.items()}
    if reasons:
        first, count = min(reasons), len(row)
        said = (
            f'reward "{settings.name}" gave no score to {len(reasons)} of {count} samples, sample {first} '
            f'("{inputs.prompts[first]}") for one: {reasons[first]}'
        )
        if settings.on_error != "drop":
            if error is None or isinstance(error, UnscoredError):
                raise RuntimeError(said)
            raise RuntimeError(f'reward "{settings.name}" failed: {reasons[first]}') from error
        warnings.warn(f"{said}; they are dropped", stacklevel=2)
        row[list(reasons)] = torch.nan
    return row


def _once(reward: Reward, name: str, inputs: RewardInput) -> tuple[Tensor, dict[int, str], Exception | None]:
    """Scores float32 `[B]`, why some are missing by sample, and what was raised."""
    count, reasons = len(inputs.prompts), dict[int, str]()
    raised: Exception | None = None
    try:
        scores = reward(inputs)
    except UnscoredError as error:
        scores, reasons, raised = error.scores, error.reasons, error
        if not reasons.keys() <= set(range(count)):
            raise RuntimeError(f'reward "{name}" named samples {sorted(reasons)}, want some of {count}') from error
    except Exception as error:
        scores, raised = torch.zeros(count), error
        reasons = dict.fromkeys(range(count), f"{type(error).__name__}: {error}")
    if not isinstance(scores, Tensor) or scores.shape != (count,) or not scores.is_floating_point():
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RuntimeError(f'reward "{name}" returned {got}, want floats of shape ({count},)') from raised
    row = scores.detach().to("cpu", torch.float32, copy=True)
    for sample in (~row.isfinite()).nonzero().flatten().tolist():
        reasons.setdefault(sample, f"got {row[sample].item()}, want a finite number")
    return row, reasons, raised
