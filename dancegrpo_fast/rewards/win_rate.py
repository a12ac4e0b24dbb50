"""Scores turned into comparisons within a group, after Pref-GRPO (Wang et al., 2025, arXiv 2508.20751)."""

import torch
from torch import Tensor


def win_rates(scores: Tensor, group: Tensor) -> Tensor:
    """Return the share of the other samples of its group that each sample beats; ties count half.

    Args:
        scores: float32 [B]; NaN for a sample that was dropped, which is compared with none.
        group: int64 [B], index of the group of each sample, in any order.

    Returns:
        float32 [B] in [0, 1]; the mean of every group is 1/2. NaN for what was dropped, and for the only one of a group
        that was not.

    Raises:
        ValueError: shapes differ, or a group has a single sample.
    """
    if scores.ndim != 1 or group.shape != scores.shape:
        raise ValueError(f"group: got shape {tuple(group.shape)}, want that of the scores, {tuple(scores.shape)}")
    rates = torch.empty_like(scores)
    for index in group.unique().tolist():
        rows = (group == index).nonzero().squeeze(1)
        if len(rows) < 2:
            raise ValueError(f"group: got a single sample in group {index}, want at least 2 to compare")
        own, other = scores[rows, None], scores[rows]
        wins = (own > other).float() + 0.5 * (own == other).float()
        # A sample ties with itself; one that was dropped does not.
        count = (~other.isnan()).sum()
        rates[rows] = torch.where((count > 1) & ~other.isnan(), (wins.sum(dim=1) - 0.5) / (count - 1), torch.nan)
    return rates
