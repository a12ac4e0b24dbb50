"""Group-relative advantages and the choice of samples to train on."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _grouped(name: str, rewards: Tensor, group_size: int) -> Tensor:
    if rewards.ndim not in (1, 2) or not rewards.is_floating_point() or rewards.numel() == 0:
        raise ValueError(f"{name}: got {rewards.dtype} of shape {tuple(rewards.shape)}, want floats [B] or [K, B]")
    if group_size < 2:
        raise ValueError(f"group_size: got {group_size}, want at least 2")
    if rewards.shape[-1] % group_size:
        raise ValueError(f"group_size: got {group_size} for {rewards.shape[-1]} rewards, want a divisor of them")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"{name}: got values that are not finite, want finite numbers only")
    return rewards.reshape(-1, rewards.shape[-1] // group_size, group_size).double()


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    weights: Sequence[float] | None = None,
    eps: float = 1e-8,
    unbiased: bool = True,
    divide_by_std: bool = True,
) -> Tensor:
    """`(r - mean) / (std + eps)` within each group of consecutive samples; several rewards add their advantages.

    Args:
        rewards: floats `[B]`, or `[K, B]` for K rewards; samples of a group are neighbours.
        group_size: samples of one prompt, G.
        weights: K factors of the advantages (never of the rewards); default 1 each.
        eps: added to the standard deviation.
        unbiased: divide the variance by G - 1 (as the paper) instead of G.
        divide_by_std: False only subtracts the mean.

    Returns:
        float32 `[B]`, computed in float64. A group whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: empty, non-finite or wrongly shaped rewards, or a group size that does not divide B.
    """
    grouped = _grouped("rewards", rewards, group_size)
    if weights is not None and len(weights) != len(grouped):
        raise ValueError(f"weights: got {len(weights)}, want one for each of the {len(grouped)} rewards")
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    if divide_by_std:
        centred = centred / (grouped.std(dim=-1, keepdim=True, correction=1 if unbiased else 0) + eps)
    # Rounding of the mean would otherwise be blown up by a deviation of zero.
    constant = grouped.amax(dim=-1, keepdim=True) == grouped.amin(dim=-1, keepdim=True)
    advantages = torch.where(constant, 0.0, centred)
    factors = torch.tensor([1.0] * len(grouped) if weights is None else list(weights), dtype=torch.float64)
    summed = (factors.to(advantages.device)[:, None, None] * advantages).sum(dim=0)
    return summed.flatten().float()


def best_and_worst(advantages: Tensor, group_size: int, k: int) -> Tensor:
    """The k best and k worst samples of every group, for best-of-N training: int64 `[groups * 2k]`, ascending.

    Args:
        advantages: floats `[B]`; samples of a group are neighbours.
        group_size: samples of one prompt, N.
        k: how many to keep at either end; ties keep the earlier sample.

    Raises:
        ValueError: `2 k` exceeds the group, or the group size does not divide B.
    """
    grouped = _grouped("advantages", advantages, group_size)[0]
    if not 1 <= 2 * k <= group_size:
        raise ValueError(f"k: got {k}, want 1 to {group_size // 2} (half of the group)")
    best = grouped.argsort(dim=-1, descending=True, stable=True)[:, :k]
    worst = grouped.scatter(1, best, torch.inf).argsort(dim=-1, stable=True)[:, :k]
    kept = torch.cat([best, worst], dim=1)
    first = torch.arange(len(grouped), device=kept.device)[:, None] * group_size
    return (kept + first).flatten().sort().values
