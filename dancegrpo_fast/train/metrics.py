"""The row of `metrics.jsonl` that an iteration leaves, over all processes."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.policy_loss import PolicyMetrics
from ..processes import Processes
from .update import Tally


def metrics_row(
    iteration: int,
    names: Sequence[str],
    rewards: Tensor,
    advantages: Tensor,
    group_size: int,
    tally: Tally,
    processes: Processes,
    *,
    with_kl: bool,
) -> dict[str, Any]:
    """One read of the device, and one sum and one maximum over the processes.

    Args:
        iteration: its number.
        names: of the K rewards.
        rewards: float32 `[K, B]` of all processes.
        advantages: float32 `[B]`.
        group_size: samples of a prompt.
        tally: of this process's updates.
        processes: of the run.
        with_kl: there is a reference model to be away from.

    Raises:
        RuntimeError: a gradient norm that is not finite.
    """
    groups = rewards.reshape(len(rewards), -1, group_size)
    constant = (groups.amax(dim=-1) == groups.amin(dim=-1)).all(dim=0)
    row: dict[str, Any] = {"iteration": iteration}
    for name, values in zip(names, rewards, strict=True):
        row[f"reward/{name}"] = float(values.mean())
        row[f"reward_std/{name}"] = float(values.std())
    row["zero_std_groups"] = int(constant.sum())
    row["advantage_max"] = float(advantages.abs().max())
    norms = torch.stack([torch.as_tensor(norm) for norm in tally.grad_norms]).tolist()
    row["grad_norm"] = sum(norms) / len(norms)
    if not all(math.isfinite(norm) for norm in norms):
        raise RuntimeError(f"iteration {iteration}: the gradient norm is {norms}, want finite numbers")
    sums, (deviation, first), counts = _over_processes(tally, processes)
    # Without a sample in the first update, nothing was on policy.
    if sums["samples"] > 0:
        row["pairs"] = int(sums["samples"])
        for name in PolicyMetrics._fields[1:]:
            if name != "ratio_max_dev" and (name != "reference_kl" or with_kl):
                row[name] = sums[name] / sums["samples"]
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


def _over_processes(tally: Tally, processes: Processes) -> tuple[dict[str, float], list[float], dict[str, int]]:
    """Sums of the metrics, the largest deviations (of all updates, of the first; -1 for none), and counts."""
    none = torch.tensor(-1.0, device=processes.device)
    sums = torch.zeros(len(PolicyMetrics._fields), device=processes.device) if tally.sums is None else tally.sums
    counts = torch.tensor(list(tally.counts.values()), dtype=torch.float64, device=processes.device)
    added = processes.sum(torch.cat([sums.double(), counts]))
    largest = [none if dev is None else dev for dev in (tally.max_dev, tally.first_max_dev)]
    # A maximum may lose what is not a number.
    most = processes.max(torch.stack(largest).nan_to_num(nan=torch.inf))
    host = torch.cat([added, most.double()]).tolist()
    fields = len(PolicyMetrics._fields)
    found = [int(value) for value in host[fields:-2]]
    return dict(zip(PolicyMetrics._fields, host, strict=False)), host[-2:], dict(zip(tally.counts, found, strict=True))
