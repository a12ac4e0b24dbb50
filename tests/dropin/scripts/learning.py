"""An update as both of the scripts make it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

CLIP = 1e-4


def update(
    x: Tensor,
    steps: Iterable[Any],
    score_of: Callable[[Any], Tensor],
    scores: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    clip_norm: Callable[[float], Tensor],
) -> dict[str, Any]:
    """Of the latents `x`, by scores of their steps anew and at the rollout; what was seen of it."""
    reward = x.float().flatten(1).std(dim=1)
    advantages = (reward - reward.mean()) / reward.std()
    ratios, losses = [], []
    for i in steps:
        ratio = torch.exp(score_of(i) - scores[i])
        clipped = -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = torch.maximum(-advantages * ratio, clipped).mean()
        loss.backward()
        ratios += (ratio.detach() - 1).tolist()
        losses.append(loss.item())
    norm = clip_norm(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"ratios": ratios, "loss": sum(losses), "norm": norm.item()}
