"""What an iteration's updates did, over all processes, and the row of `metrics.jsonl` that it leaves."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..advantages import group_advantages, without_spread
from ..processes import Processes
from ..recipe import TrainSettings
from .collect import Batch
from .losses.base import Term


@dataclass
class Tally:
    """What an iteration's updates did; tensors stay on the device until the iteration ends.

    Attributes:
        names: of the loss's metrics.
        sums: of the samples and of each metric over them, `[1 + len(names)]`.
        max_dev: largest `|ratio - 1|` of the iteration, and `first_max_dev` of its first update.
        grad_norms: one per update, before clipping.
        counts: rows of model calls and the work that was not done.
    """

    names: Sequence[str]
    sums: Tensor | None = None
    max_dev: Tensor | None = None
    first_max_dev: Tensor | None = None
    grad_norms: list[Tensor] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("model_rows", "padded_rows", "shared_rows_saved", "zero_advantage_skipped", "backwards_skipped"), 0
        )
    )

    def add(self, term: Term, first: bool) -> None:
        """Adds the metrics of one term; `first` marks the first update after a rollout."""
        sums = torch.stack([term.samples, *(term.metrics[name] * term.samples for name in self.names)])
        self.sums = sums if self.sums is None else self.sums + sums
        dev = term.ratio_max_dev
        if dev is not None:
            self.max_dev = dev if self.max_dev is None else torch.maximum(self.max_dev, dev)
            if first:
                self.first_max_dev = dev if self.first_max_dev is None else torch.maximum(self.first_max_dev, dev)

    def over(self, processes: Processes) -> tuple[list[float], list[float], dict[str, int]]:
        """`sums`, the largest deviations (of all updates, of the first; -1 for none) and `counts` of all processes."""
        none = torch.tensor(-1.0, device=processes.device)
        sums = torch.zeros(1 + len(self.names), device=processes.device) if self.sums is None else self.sums
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64, device=processes.device)
        added = processes.sum(torch.cat([sums.double(), counts]))
        largest = [none if dev is None else dev for dev in (self.max_dev, self.first_max_dev)]
        # A maximum may lose what is not a number.
        most = processes.max(torch.stack(largest).nan_to_num(nan=torch.inf))
        host = torch.cat([added, most.double()]).tolist()
        found = map(int, host[len(sums) : -2])
        return host[: len(sums)], host[-2:], dict(zip(self.counts, found, strict=True))


def metrics_row(
    iteration: int, names: Sequence[str], train: TrainSettings, batch: Batch, tally: Tally, processes: Processes
) -> dict[str, Any]:
    """One read of the device, and one sum and one maximum over the processes.

    Args:
        iteration: its number.
        names: of the K rewards.
        train: how they become advantages.
        batch: the samples.
        tally: of this process's updates.
        processes: of the run.

    Raises:
        RuntimeError: a gradient norm that is not finite.
    """
    size, row = train.group_size, {"iteration": iteration}
    for name, values in zip(names, batch.rewards, strict=True):
        row[f"reward/{name}"] = float(values.mean())
        row[f"reward_std/{name}"] = float(values.std())
        row[f"reward_group_std/{name}"] = float(values.reshape(-1, size).std(dim=1).mean())
    row["zero_std_groups"] = int(without_spread(batch.rewards, size).all(dim=0).sum())
    apart = torch.stack([group_advantages(values, size, **train.normalisation()) for values in batch.rewards])
    row["advantage_clip_fraction"] = float((apart.abs() > train.advantage_clip).float().mean())
    row["advantage_max"] = float(batch.advantages.abs().max())
    norms = torch.stack([torch.as_tensor(norm) for norm in tally.grad_norms]).tolist()
    row["grad_norm"] = sum(norms) / len(norms)
    if not all(math.isfinite(norm) for norm in norms):
        raise RuntimeError(f"iteration {iteration}: the gradient norm is {norms}, want finite numbers")
    (samples, *sums), (deviation, first), counts = tally.over(processes)
    # Without a sample in the first update, nothing was on policy.
    if samples > 0:
        row["pairs"] = int(samples)
        row |= {name: value / samples for name, value in zip(tally.names, sums, strict=True)}
        if deviation >= 0:
            row["ratio_max_dev"] = deviation
        if first >= 0:
            row["ratio_first_update_max_dev"] = first
            if first != 0.0:
                warnings.warn(
                    f"iteration {iteration}: the first update's ratio is {first:.1e} away from 1; "
                    "the model does not repeat its own bits between rollout and replay",
                    stacklevel=2,
                )
    row["skipped"] = counts
    return row
