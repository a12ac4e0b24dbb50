"""Samplers of rectified flows: a table for the kernels, and the same in the projects' own order of operations."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import transitions
from ..checks import check_choice
from ..transitions import TransitionTable
from ._common import Mean, Published, Rows, Sampler, cached, times, unnormalized


class Kind(NamedTuple):
    """A sampler by name, and what of it the projects choose.

    Attributes:
        name: "flow", "wan", "dance", "cps", "ode", or "distance": Euler steps scored by `-mean(d^2)`.
        level: noise level, where the sampler has one.
        normalized: with the Gaussian's constants in the log-probability.
        sde: False leaves Dance-SDE's score term out of the mean.
        window: the steps at this level, all others at 0; None for all.
        sigma_max: what stands for a sigma of 1 under Flow-SDE's root; None takes the sigma after it.
        writing: whose order of operations, "scripts" or "factory" (Flow-Factory's).
        exact_noise: Dance-SDE's noise is scaled by a Python number, else by one in the schedule's dtype.
    """

    name: str
    level: float = 0.0
    normalized: bool = True
    sde: bool = True
    window: tuple[int, ...] | None = None
    sigma_max: float | None = None
    writing: str = "scripts"
    exact_noise: bool = False

    def over(self, name: str, sigmas: Tensor) -> Sampler:
        """The sampler over a schedule, the argument `name`; kept as long as that tensor lives."""
        return cached(name, sigmas, self, self._build)

    def _build(self, sigmas: Tensor) -> Sampler:
        check_choice("kind", self.name, ("flow", "wan", "dance", "cps", "ode", "distance"))
        table = self._table(sigmas, self.level)
        if self.window is not None:
            table = transitions.mixed(table, self._table(sigmas, 0.0), self.window)
        values = sigmas.detach().cpu()
        on_cpu = sigmas.device.type == "cpu"
        return Sampler(table if self.normalized else unnormalized(table), lambda: self._published(values, on_cpu))

    def _table(self, sigmas: Tensor, level: float) -> TransitionTable:
        if self.name in ("ode", "distance"):
            euler = transitions.ode(sigmas)
            if self.name == "ode":
                return euler
            return replace(euler, tau=torch.ones_like(euler.tau), kind=["quadratic"] * len(euler))
        if self.name == "cps":
            return transitions.cps(sigmas, level)
        if self.name == "dance":
            table = transitions.dance_sde(sigmas, level)
            return table if self.sde else _without_score(table)
        if self.name == "wan":
            return _wan(transitions.ode(sigmas))
        table = transitions.flow_sde(sigmas, level)
        if self.sigma_max is None or not bool(sigmas[0] == 1):
            return table
        if not 0.0 <= self.sigma_max < 1.0:
            raise ValueError(f"sigma_max: got {self.sigma_max}, want a number from 0 to below 1")
        return transitions.mixed(transitions.dance_sde(sigmas, level / math.sqrt(1.0 - self.sigma_max)), table, [0])

    def _published(self, values: Tensor, on_cpu: bool) -> Published:
        s, n = values[:-1], values[1:]
        level = torch.full_like(s, self.level)
        if self.window is not None:
            level = torch.zeros_like(s)
            level[list(self.window)] = self.level
        dt = n - s
        root = torch.sqrt(-dt)
        columns = {"sigma": s, "dt": dt, "rest": 1 - s, "root": root}
        if self.name in ("ode", "distance"):
            tau = torch.full_like(s, float(self.name == "distance"))
            return Published(columns | {"tau": tau, "std": tau}, _ode_mean)
        if self.name == "cps":
            angle = math.sin(self.level * math.pi / 2)
            std = n * (torch.sin(level * torch.pi / 2) if self.writing == "factory" else angle)
            columns |= {"tau": std, "std": std, "next_rest": 1 - n, "kept": torch.sqrt(n**2 - std**2)}
            return Published(columns, _cps_mean)
        if self.name == "dance":
            tau = self.level * (s - n).double().sqrt() if self.exact_noise else level * root
            columns |= {"tau": tau, "std": level, "square": s**2, "half_variance": 0.5 * level**2}
            mean = _factory_dance_mean if self.writing == "factory" else _dance_mean(self.sde, self.level, on_cpu)
            return Published(columns, mean, on_cpu=on_cpu, noise_first=self.exact_noise)
        if self.name == "wan":
            top, bottom = float(values[1]), float(values[-1])
            std = bottom + (top - bottom) * s
        else:
            top = float(values[1]) if self.sigma_max is None else self.sigma_max
            std = torch.sqrt(s / (1 - torch.where(s == 1, top, s))) * level
        columns |= {"gain": 1 + std**2 / (2 * s) * dt, "factor": 1 + std**2 * (1 - s) / (2 * s)}
        return Published(columns | {"tau": std * root, "std": std}, _flow_mean)


def _without_score(table: TransitionTable) -> TransitionTable:
    one, zero = torch.ones_like(table.a), torch.zeros_like(table.a)
    return replace(table, a=one, b=table.drift, denoised_weight=zero)


def _wan(euler: TransitionTable) -> TransitionTable:
    """Flow-GRPO's SDE for Wan: the level goes linearly from the second sigma to the last."""
    s, dt = euler.times, -euler.step_size
    top, bottom = s[1] if len(s) > 1 else s[0] + dt[0], s[-1] + dt[-1]
    level = bottom + (top - bottom) * s
    pull = level.square() * dt / (2.0 * s)
    return TransitionTable.from_coefficients(
        1.0 + pull, dt + pull * (1.0 - s), level * torch.sqrt(-dt), p=1.0, q=-s, times=s, step_size=-dt
    )


def _flow_mean(latents: Tensor, output: Tensor, row: Rows) -> Tensor:
    return latents * row("gain") + output * row("factor") * row("dt")


def _ode_mean(latents: Tensor, output: Tensor, row: Rows) -> Tensor:
    return latents + output * row("dt")


def _cps_mean(latents: Tensor, output: Tensor, row: Rows) -> Tensor:
    clean = latents - row("sigma") * output
    noise = latents + output * row("rest")
    return clean * row("next_rest") + noise * row("kept")


def _factory_dance_mean(latents: Tensor, output: Tensor, row: Rows) -> Tensor:
    clean = latents - row("sigma") * output
    pull = row("half_variance") * (latents - clean * row("rest")) / row("square")
    return latents + (output + pull) * row("dt")


def _dance_mean(sde: bool, eta: float, on_cpu: bool) -> Mean:
    def mean(latents: Tensor, output: Tensor, row: Rows) -> Tensor:
        moved = latents + times(row("dt"), output, on_cpu)
        if not sde:
            return moved
        clean = latents - times(row("sigma"), output, on_cpu)
        score = -(latents - clean * row("rest")) / row("square")
        return moved + -0.5 * eta**2 * score * row("dt")

    return mean
