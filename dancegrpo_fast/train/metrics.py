"""What an iteration's updates did, over all processes, and the row of `metrics.jsonl` that it leaves."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

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
        steps: of a trajectory.
        sums: of the samples and of each metric over them, `[1 + len(names)]`.
        max_dev: largest `|ratio - 1|` of the iteration, and `first_max_dev` of its first update.
        grad_norms: one per update, before clipping.
        moved: of each term.
        counts: rows of model calls and the work that was not done.
    """

    names: Sequence[str]
    steps: int
    sums: Tensor | None = None
    max_dev: Tensor | None = None
    first_max_dev: Tensor | None = None
    grad_norms: list[Tensor] = field(default_factory=list)
    moved: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "model_rows",
                "padded_rows",
                "one_pass_rows",
                "shared_rows_saved",
                "zero_advantage_skipped",
                "backwards_skipped",
            ),
            0,
        )
    )

    def add(self, term: Term, first: bool) -> None:
        """Adds the metrics of one term; `first` marks the first update after a rollout."""
        sums = torch.stack([term.samples, *(term.metrics[name] * term.samples for name in self.names)])
        self.sums = sums if self.sums is None else self.sums + sums
        if term.moved is not None:
            self.moved.append(term.moved)
        dev = term.ratio_max_dev
        if dev is not None:
            self.max_dev = dev if self.max_dev is None else torch.maximum(self.max_dev, dev)
            if first:
                self.first_max_dev = dev if self.first_max_dev is None else torch.maximum(self.first_max_dev, dev)

    def over(self, processes: Processes) -> "Tallied":
        """Of all processes, on the host."""
        none = torch.tensor(-1.0, device=processes.device)
        sums = torch.zeros(1 + len(self.names), device=processes.device) if self.sums is None else self.sums
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64, device=processes.device)
        pairs, moved, furthest = self._by_step(processes.device)
        added = [sums.double(), counts, pairs, moved]
        largest = torch.stack([none if dev is None else dev for dev in (self.max_dev, self.first_max_dev)])
        # A maximum may lose what is not a number.
        most = torch.cat([largest.double(), furthest])
        most = most.masked_fill(most.isnan(), torch.inf)
        host = torch.cat([processes.sum(torch.cat(added)), processes.max(most)]).tolist()
        parts = iter(host)
        (samples, *means), *others = [list(islice(parts, len(part))) for part in (*added, largest, furthest)]
        found, each, whole, deviations, far = others
        return Tallied(
            samples,
            [value / samples for value in means] if samples > 0 else [],
            deviations,
            dict(zip(self.counts, map(int, found), strict=True)),
            {
                "mean": [value / count if count else None for value, count in zip(whole, each, strict=True)],
                "max": [value if count else None for value, count in zip(far, each, strict=True)],
            },
        )

    def _by_step(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """How many pairs there are of every step, how far they moved in sum, and at most; float64 `[steps]` each."""
        if not self.moved:
            nothing = torch.zeros(self.steps, dtype=torch.float64, device=device)
            return nothing, nothing, nothing
        steps, moved = (torch.cat(values) for values in zip(*self.moved, strict=True))
        # Not scattered: atomic sums have an order of their own in every run.
        here = steps == torch.arange(self.steps, device=device)[:, None]
        each = torch.where(here, moved.double(), 0.0)
        return here.sum(dim=1, dtype=torch.float64), each.sum(dim=1), each.amax(dim=1)


class Tallied(NamedTuple):
    """What all processes' updates did.

    Attributes:
        samples: how many pairs the means are over.
        means: by the loss's names; none without samples.
        deviations: the largest `|ratio - 1|` of all updates, and of the first; -1 for none.
        counts: as in `Tally`.
        moved: "mean" and "max" of how far log-probabilities moved, by step; None for a step without pairs.
    """

    samples: float
    means: list[float]
    deviations: list[float]
    counts: dict[str, int]
    moved: dict[str, list[float | None]]


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
    size, valid = train.group_size, batch.valid
    row: dict[str, Any] = {"iteration": iteration}
    for name, values in zip(names, batch.rewards, strict=True):
        row[f"reward/{name}"] = float(values[valid].mean())
        row[f"reward_std/{name}"] = float(values[valid].std())
        groups = zip(values.double().view(-1, size), valid.view(-1, size), strict=True)
        row[f"reward_group_std/{name}"] = fmean(float(group[own].std()) for group, own in groups if bool(own.any()))
    row["dropped"] = int((~valid).sum())
    row["zero_std_groups"] = int(without_spread(batch.rewards, size, valid=valid).all(dim=0).sum())
    apart = [group_advantages(values, size, valid=valid, **train.normalisation())[valid] for values in batch.rewards]
    row["advantage_clip_fraction"] = float((torch.stack(apart).abs() > train.advantage_clip).float().mean())
    row["advantage_max"] = float(batch.advantages.abs().max())
    norms = torch.stack([torch.as_tensor(norm) for norm in tally.grad_norms]).tolist()
    row["grad_norm"] = sum(norms) / len(norms)
    if not all(math.isfinite(norm) for norm in norms):
        raise RuntimeError(f"iteration {iteration}: the gradient norm is {norms}, want finite numbers")
    found = tally.over(processes)
    # Without a sample in the first update, nothing was on policy.
    if found.samples > 0:
        row["pairs"] = int(found.samples)
        row |= dict(zip(tally.names, found.means, strict=True))
        deviation, first = found.deviations
        if deviation >= 0:
            row["ratio_max_dev"] = deviation
            row["log_prob_change"] = found.moved
        if first >= 0:
            row["ratio_first_update_max_dev"] = first
            if first != 0.0:
                warnings.warn(
                    f"iteration {iteration}: the first update's ratio is {first:.1e} away from 1; "
                    "the model does not repeat its own bits between rollout and replay",
                    stacklevel=2,
                )
    row["skipped"] = found.counts
    return row
