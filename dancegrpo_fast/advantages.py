"""Group-relative advantages and the choice of samples to train on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import as_column, as_float64, check_bool, check_int, check_level, shown


def _grouped(name: str, rewards: Any, group_size: Any) -> Tensor:
    if not isinstance(rewards, Tensor):
        rewards = as_float64(name, rewards)
    floats = rewards.is_floating_point() and rewards.layout == torch.strided
    if not floats or rewards.ndim not in (1, 2) or rewards.numel() == 0:
        raise ValueError(f"{name}: got {shown(rewards)}, want floats [B] or [K, B]")
    group_size = check_int("group_size", group_size, 2)
    if rewards.shape[-1] % group_size:
        raise ValueError(f"group_size: got {group_size} for {rewards.shape[-1]} rewards, want a divisor of them")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"{name}: got values that are not finite, want finite numbers only")
    grouped: Tensor = rewards.reshape(-1, rewards.shape[-1] // group_size, group_size).double()
    return grouped


def group_advantages(
    rewards: Tensor | Sequence[float] | Sequence[Sequence[float]],
    group_size: int,
    *,
    weights: Sequence[float] | None = None,
    eps: float = 1e-8,
    unbiased: bool = True,
    divide_by_std: bool = True,
) -> Tensor:
    """`(r - mean) / (std + eps)` within each group of consecutive samples; several rewards add their advantages.

    Args:
        rewards: floats `[B]`, or `[K, B]` for K rewards; samples of a group are neighbours. A list or an array of
            numbers becomes a tensor on the CPU.
        group_size: samples of one prompt, G.
        weights: K factors of the advantages (never of the rewards); default 1 each.
        eps: added to the standard deviation, at least 0.
        unbiased: divide the variance by G - 1 (as the paper) instead of G.
        divide_by_std: False only subtracts the mean.

    Returns:
        float32 `[B]`, computed in float64. A group whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: empty, non-finite or wrongly shaped rewards, a group size that does not divide B, or a setting of
            the wrong type or range.
    """
    grouped = _grouped("rewards", rewards, group_size)
    eps = check_level("eps", eps)
    check_bool("unbiased", unbiased)
    check_bool("divide_by_std", divide_by_std)
    factors = as_column("weights", [1.0] * len(grouped) if weights is None else weights)
    if len(factors) != len(grouped):
        raise ValueError(f"weights: got {len(factors)}, want one for each of the {len(grouped)} rewards")
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    if divide_by_std:
        centred = centred / (grouped.std(dim=-1, keepdim=True, correction=1 if unbiased else 0) + eps)
    # Rounding of the mean would otherwise be blown up by a deviation of zero.
    constant = grouped.amax(dim=-1, keepdim=True) == grouped.amin(dim=-1, keepdim=True)
    advantages = torch.where(constant, 0.0, centred)
    summed = (factors.to(advantages.device)[:, None, None] * advantages).sum(dim=0)
    return summed.flatten().float()


def best_and_worst(advantages: Tensor | Sequence[float], group_size: int, k: int) -> Tensor:
    """The k best and k worst samples of every group, for best-of-N training: int64 `[groups * 2k]`, ascending.

    Args:
        advantages: floats `[B]`, as for `group_advantages`; samples of a group are neighbours.
        group_size: samples of one prompt, N.
        k: how many to keep at either end; ties keep the earlier sample.

    Raises:
        ValueError: advantages that are not finite floats `[B]`, `2 k` above the group, or a group size that does not
            divide B.
    """
    found = _grouped("advantages", advantages, group_size)
    if len(found) != 1:
        raise ValueError(f"advantages: got {shown(advantages)}, want floats [B]")
    grouped = found[0]
    k = check_int("k", k, 1, group_size // 2, " (half of the group)")
    best = grouped.argsort(dim=-1, descending=True, stable=True)[:, :k]
    worst = grouped.scatter(1, best, torch.inf).argsort(dim=-1, stable=True)[:, :k]
    kept = torch.cat([best, worst], dim=1)
    first = torch.arange(len(grouped), device=kept.device)[:, None] * group_size
    return (kept + first).flatten().sort().values
