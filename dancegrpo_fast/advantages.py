"""Group-relative advantages and the choice of samples to train on."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import as_column, as_float64, check_bool, check_choice, check_int, check_level, check_number, shown

# `torch.testing.assert_close` takes two float32 numbers for equal whose distance is this share of them: what a sum over
# a network's layers rounds to, a few units of the last place.
ROUNDING = 1.3e-6


def _grouped(name: str, rewards: Any, group_size: Any, valid: Any) -> tuple[Tensor, Tensor]:
    """Float64 `[K, groups, group_size]`, 0 where not valid, and bool `[groups, group_size]`."""
    if not isinstance(rewards, Tensor):
        rewards = as_float64(name, rewards)
    floats = rewards.is_floating_point() and rewards.layout == torch.strided
    if not floats or rewards.ndim not in (1, 2) or rewards.numel() == 0:
        raise ValueError(f"{name}: got {shown(rewards)}, want floats [B] or [K, B]")
    group_size = check_int("group_size", group_size, 2)
    if rewards.shape[-1] % group_size:
        raise ValueError(f"group_size: got {group_size} for {rewards.shape[-1]} rewards, want a divisor of them")
    if valid is None:
        valid = torch.ones(rewards.shape[-1:], dtype=torch.bool, device=rewards.device)
    elif not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.shape != rewards.shape[-1:]:
        raise ValueError(f"valid: got {shown(valid)}, want bool ({rewards.shape[-1]},)")
    rewards = torch.where(valid, rewards, 0.0)
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"{name}: got values that are not finite, want finite numbers only")
    grouped: Tensor = rewards.reshape(-1, rewards.shape[-1] // group_size, group_size).double()
    return grouped, valid.reshape(-1, group_size)


def group_advantages(
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]],
    group_size: int,
    *,
    weights: Sequence[float] | None = None,
    eps: float = 1e-8,
    unbiased: bool = True,
    divide_by_std: bool = True,
    std_of: str = "group",
    std_floor: float = 0.0,
    clip: float = math.inf,
    valid: Tensor | None = None,
) -> Tensor:
    """`(r - mean) / (std + eps)` within each group of consecutive samples; several rewards add their advantages.

    A group whose rewards differ by rounding alone (`without_spread`) gets exactly 0 from that reward.

    Args:
        rewards: floats `[B]`, or `[K, B]` for K rewards; samples of a group are neighbours. A list or an array of
            numbers becomes a tensor on the CPU.
        group_size: samples of one prompt, G.
        weights: K factors of the advantages (never of the rewards); default 1 each.
        eps: added to the standard deviation, at least 0.
        unbiased: divide the variance by G - 1 (as the paper) instead of G.
        divide_by_std: False only subtracts the mean (Dr. GRPO, arXiv 2503.20783).
        std_of: the "group", or all B samples of the "batch" (Flow-GRPO's `global_std`, Lite PPO in arXiv 2508.08221);
            the mean is always the group's.
        std_floor: a smaller standard deviation counts as this, at least 0.
        clip: largest absolute advantage of each reward, before the weights, as the published HunyuanVideo script has
            it.
        valid: bool `[B]`, on the device of `rewards`: the others are as if they were not there; default all.

    Returns:
        float32 `[B]`, computed in float64; exactly 0 for what is not valid.

    Raises:
        ValueError: empty, non-finite or wrongly shaped rewards, a group size that does not divide B, or a setting of
            the wrong type or range.
    """
    grouped, counted = _grouped("rewards", rewards, group_size, valid)
    eps = check_level("eps", eps)
    check_bool("unbiased", unbiased)
    check_bool("divide_by_std", divide_by_std)
    check_choice("std_of", std_of, ("group", "batch"))
    std_floor = check_level("std_floor", std_floor)
    clip = check_number("clip", clip, 0.0, math.inf, "a number of at least 0")
    factors = as_column("weights", [1.0] * len(grouped) if weights is None else weights)
    if len(factors) != len(grouped):
        raise ValueError(f"weights: got {len(factors)}, want one for each of the {len(grouped)} rewards")
    centred, std = _moments(grouped, counted, (-1,), unbiased)
    if divide_by_std:
        if std_of == "batch":
            std = _moments(grouped, counted, (-2, -1), unbiased)[1]
        centred = centred / (std.clamp(min=std_floor) + eps)
    advantages = torch.where(_flat(grouped, counted)[..., None], 0.0, centred.clamp(-clip, clip))
    summed = (factors.to(advantages.device)[:, None, None] * advantages).sum(dim=0)
    return summed.flatten().float()


def without_spread(
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]], group_size: int, *, valid: Tensor | None = None
) -> Tensor:
    """The groups that teach nothing: bool `[K, groups]`, True where a reward's values differ by rounding alone.

    That is where the largest and the smallest lie no further apart than 1.3e-6 of their magnitude, which float32, in
    which rewards are computed, cannot tell from equal. Their deviation would be blown up to 1 like any other. A group
    without a valid sample is none of them.

    Args:
        rewards, group_size, valid: as for `group_advantages`.

    Raises:
        ValueError: as `group_advantages`.
    """
    grouped, counted = _grouped("rewards", rewards, group_size, valid)
    return _flat(grouped, counted) & counted.any(dim=-1)


def _moments(grouped: Tensor, counted: Tensor, over: tuple[int, ...], unbiased: bool) -> tuple[Tensor, Tensor]:
    """What is left of the values without their mean over some dimensions, and their standard deviation."""
    count = counted.sum(dim=over, keepdim=True)
    centred = torch.where(counted, grouped - grouped.sum(dim=over, keepdim=True) / count, 0.0)
    variance = centred.square().sum(dim=over, keepdim=True) / (count - (1 if unbiased else 0))
    return centred, variance.sqrt()


def _flat(grouped: Tensor, counted: Tensor) -> Tensor:
    highest = torch.where(counted, grouped, -torch.inf).amax(dim=-1)
    spread = highest - torch.where(counted, grouped, torch.inf).amin(dim=-1)
    return spread <= ROUNDING * grouped.abs().amax(dim=-1)


def best_and_worst(
    advantages: Tensor | Sequence[float], group_size: int, k: int, *, valid: Tensor | None = None
) -> Tensor:
    """The k best and k worst samples of every group, for best-of-N training: int64 `[groups * 2k]`, ascending.

    Args:
        advantages: floats `[B]`, as for `group_advantages`; samples of a group are neighbours.
        group_size: samples of one prompt, N.
        k: how many to keep at either end; ties keep the earlier sample.
        valid: bool `[B]`, on the device of `advantages`: the others are never kept, and of a group with less than 2k
            valid ones these are; default all.

    Raises:
        ValueError: advantages that are not finite floats `[B]`, `2 k` above the group, or a group size that does not
            divide B.
    """
    found, counted = _grouped("advantages", advantages, group_size, valid)
    if len(found) != 1:
        raise ValueError(f"advantages: got {shown(advantages)}, want floats [B]")
    grouped = found[0]
    k = check_int("k", k, 1, group_size // 2, " (half of the group)")
    best = torch.where(counted, grouped, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :k]
    rest = torch.where(counted, grouped, torch.inf).scatter(1, best, torch.inf)
    worst = rest.argsort(dim=-1, stable=True)[:, :k]
    kept = torch.zeros_like(counted).scatter(1, torch.cat([best, worst], dim=1), True) & counted
    return kept.flatten().nonzero().flatten()
