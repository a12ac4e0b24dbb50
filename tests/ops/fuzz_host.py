"""Fuzzed calls of what runs once on the host: advantages and the samplers' tables."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.advantages import best_and_worst, group_advantages
from dancegrpo_fast.transitions import (
    TransitionTable,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    mixed,
    ode,
    shifted_sigmas,
    vp_sde,
)

from ..tolerances import assert_same_formula, assert_within_budget
from .fuzz_draws import BF16, F16, F32, F64, INF, NAN, NO_SWITCH, NO_WORD, ODD, Call, Draw, no_int, no_number

NO_COLUMN: tuple[Any, ...] = (None, 1.5, True, [[1.0]], ["a"], [None], [1.0, NAN], [INF, 1.0], *ODD)


def no_rewards(good: Tensor) -> tuple[Any, ...]:
    spoiled = good.clone()
    spoiled[0] = NAN
    return (
        None,
        1.0,
        "12",
        good.long(),
        good[None, None],
        good[:0],
        spoiled,
        spoiled - INF,
        [None],
        good.to_sparse(),
        *ODD,
    )


def given(draw: Draw, values: Tensor) -> Any:
    """As people have rewards: a tensor, an array or a list."""
    return draw.of(values, values, values.double().numpy(), values.double().tolist())


def advantages_call(draw: Draw) -> Call:
    groups, size, count = draw.rng.randint(1, 4), draw.rng.randint(2, 6), draw.rng.randint(1, 3)
    rewards = draw.normal(count, groups * size, dtype=draw.of(F32, F64, BF16, F16)) * draw.of(1.0, 1e3, 1e-3)
    if draw.maybe(0.3):
        rewards[0, :size] = rewards[0, 0]
    rewards = rewards[0] if count == 1 and draw.maybe() else rewards
    eps, unbiased, divide = draw.of(1e-8, 1e-4, 0.0, 1), draw.maybe(), draw.maybe(0.8)
    weights = [draw.rng.uniform(-1.0, 2.0) for _ in range(count)]
    arguments = {"rewards": given(draw, rewards), "group_size": draw.of(size, np.int64(size)), "eps": eps}
    arguments |= {
        "unbiased": unbiased,
        "divide_by_std": divide,
        "weights": draw.of(weights, torch.tensor(weights, dtype=F64)),
    }

    def check(found: Tensor) -> None:
        truth = torch.zeros(groups * size, dtype=F64)
        for row, weight in zip(rewards.double().reshape(count, -1).tolist(), weights, strict=True):
            for first in range(0, groups * size, size):
                group = row[first : first + size]
                mean = sum(group) / size
                std = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1 if unbiased else size))
                for i, reward in enumerate(group):
                    if max(group) > min(group):
                        truth[first + i] += weight * (reward - mean) / (std + eps if divide else 1.0)
        assert_within_budget(found, truth, truth.float())

    refused = {
        "rewards": no_rewards(rewards.flatten()),
        "group_size": (size * groups + 1, *no_int(2)),
        "eps": no_number(0.0),
        "unbiased": NO_SWITCH,
        "divide_by_std": NO_SWITCH,
        "weights": ([1.0] * (count + 1), [], [NAN] * count, [INF] * count, ["a"] * count, 1.5, [[1.0]], *ODD),
    }
    return Call(group_advantages, arguments, check, refused)


def choice_call(draw: Draw) -> Call:
    groups, size = draw.rng.randint(1, 4), draw.rng.randint(2, 8)
    advantages, k = (draw.normal(groups * size) * 2).round() / 2, draw.rng.randint(1, size // 2)

    def check(found: Tensor) -> None:
        wanted: list[int] = []
        for first in range(0, groups * size, size):
            order = sorted(range(first, first + size), key=lambda i: (-float(advantages[i]), i))
            rest = sorted(order[k:], key=lambda i: (float(advantages[i]), i))
            wanted += order[:k] + rest[:k]
        assert found.dtype == torch.int64 and found.tolist() == sorted(wanted)

    arguments = {"advantages": given(draw, advantages), "group_size": size, "k": k}
    refused = {
        "advantages": (torch.stack([advantages] * 2), *no_rewards(advantages)),
        "group_size": (size * groups + 1, *no_int(2)),
        "k": no_int(1, size // 2),
    }
    return Call(best_and_worst, arguments, check, refused)


def sigmas_of(draw: Draw) -> Tensor:
    return shifted_sigmas(draw.rng.randint(1, 6), draw.rng.uniform(0.5, 5.0))


def schedule_call(draw: Draw) -> Call:
    steps, shift = draw.rng.randint(1, 30), draw.of(1, draw.rng.uniform(0.2, 8.0))

    def check(found: Tensor) -> None:
        u = [1.0 - i / steps for i in range(steps + 1)]
        assert_same_formula(found, torch.tensor([shift * v / (1.0 + (shift - 1.0) * v) for v in u], dtype=F64))

    refused = {"num_steps": (2**62, *no_int(1)), "shift": (0.0, *no_number(0.0))}
    return Call(shifted_sigmas, {"num_steps": steps, "shift": shift}, check, refused)


def assert_rows(table: TransitionTable, mean: list[float], tau: list[float], x: float, v: float) -> None:
    assert_same_formula(table.a * x + table.b * v, torch.tensor(mean, dtype=F64))
    assert_same_formula(table.tau, torch.tensor(tau, dtype=F64))


def flow_call(draw: Draw) -> Call:
    """A step of each flow sampler as its paper has it, from `x0 = x - s v` and `x1 = x + (1 - s) v`."""
    form = draw.of(dance_sde, flow_sde, cps, ode)
    sigmas, level = sigmas_of(draw), draw.rng.uniform(0.0, 1.0)
    name = {dance_sde: "eta", flow_sde: "noise_level", cps: "noise_level"}.get(form)
    x, v = draw.rng.gauss(0, 1), draw.rng.gauss(0, 1)

    def check(table: TransitionTable) -> None:
        values, means, taus = sigmas.tolist(), [], []
        for s, n in pairwise(values):
            clean, noise, dt = x - s * v, x + (1 - s) * v, n - s
            if form is cps:
                tau = n * math.sin(level * math.pi / 2)
                means.append((1 - n) * clean + math.sqrt(max(n * n - tau * tau, 0.0)) * noise)
                taus.append(tau)
                continue
            at = values[1] if s == 1.0 else s
            g = {dance_sde: level, ode: 0.0}.get(form, level * math.sqrt(s / (1 - at)) if at < 1 else 0.0)
            # Reverse SDE: drift v, less half the squared noise times the score of x.
            score = -(x - (1 - s) * clean) / s**2
            means.append(x + v * dt - 0.5 * g * g * score * dt)
            taus.append(g * math.sqrt(-dt))
        assert_rows(table, means, taus, x, v)
        assert repr(table).startswith(f"TransitionTable({len(sigmas) - 1} rows, ")

    arguments: dict[str, Any] = {"sigmas": draw.of(sigmas, sigmas.tolist(), tuple(sigmas.tolist()), sigmas.numpy())}
    bad_sigmas = (sigmas.flip(0), sigmas[:1], [1.0, 1.0], [1.5, 0.5], [0.5, -0.1], *NO_COLUMN)
    refused: dict[str, tuple[Any, ...]] = {"sigmas": bad_sigmas}
    if name is not None:
        arguments[name] = level
        refused[name] = (*((1.01,) if form is cps else ()), *no_number(0.0))
    if form is flow_sde and len(sigmas) == 2:
        # One step from 1 to 0 has no sigma to stand for 1.
        arguments["sigmas"], sigmas = [0.9, 0.1], torch.tensor([0.9, 0.1], dtype=F64)
    return Call(form, arguments, check, refused)


def diffusion_call(draw: Draw) -> Call:
    form, eta = draw.of(ddim, vp_sde), draw.rng.uniform(0.0, 1.0)
    alphas = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=F64), 0)
    times = sorted(draw.rng.sample(range(5, 1000), draw.rng.randint(1, 6)), reverse=True)
    prediction, final = draw.of("epsilon", "v_prediction", "sample"), draw.of(1.0, float(alphas[0]))
    x, v = draw.rng.gauss(0, 1), draw.rng.gauss(0, 1)

    def check(table: TransitionTable) -> None:
        means, taus = [], []
        for here, after in zip(times, [*times[1:], None], strict=True):
            a, b = float(alphas[here]), final if after is None else float(alphas[after])
            eps, clean = v, (x - math.sqrt(1 - a) * v) / math.sqrt(a)
            if prediction == "v_prediction":
                clean, eps = math.sqrt(a) * x - math.sqrt(1 - a) * v, math.sqrt(a) * v + math.sqrt(1 - a) * x
            elif prediction == "sample":
                clean, eps = v, (x - math.sqrt(a) * v) / math.sqrt(1 - a)
            if form is ddim:
                tau = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
                means.append(math.sqrt(b) * clean + math.sqrt(max(1 - b - tau * tau, 0.0)) * eps)
            else:
                growth = 0.5 * math.log(b / a)
                tau = eta * math.sqrt(2 * growth)
                means.append(x + growth * x + (1 + eta**2) * growth * -eps / math.sqrt(1 - a))
            taus.append(tau)
        assert_rows(table, means, taus, x, v)

    arguments = {"alphas_cumprod": alphas, "timesteps": draw.of(times, torch.tensor(times)), "eta": eta}
    arguments |= {"prediction_type": prediction, "final_alpha_cumprod": final}
    refused = {
        "alphas_cumprod": (alphas.flip(0), alphas[:3], alphas * 2, *NO_COLUMN),
        "timesteps": ([], [1, 2], [5, 5], [1000], [3, -1], [3.5], *NO_COLUMN),
        "eta": no_number(0.0),
        "prediction_type": NO_WORD,
        "previous_timesteps": (times, [1, 2, 3, 4, 5, 6, 7], *NO_COLUMN[1:]),
        "final_alpha_cumprod": (0.0, 1.1, *no_number(0.0)),
    }
    return Call(form, arguments, check, refused)


def mixed_call(draw: Draw) -> Call:
    sigmas = shifted_sigmas(draw.rng.randint(2, 6), 3.0)
    noisy, plain = dance_sde(sigmas, 0.4), ode(sigmas)
    window = draw.of(range(1), [0, 1], [], {len(sigmas) - 2})

    def check(table: TransitionTable) -> None:
        for i in range(len(table)):
            source = noisy if i in window else plain
            for name in ("a", "b", "tau", "p", "q", "times", "step_size"):
                assert float(getattr(table, name)[i]) == float(getattr(source, name)[i])
            assert table.kind[i] == source.kind[i]

    others = (None, ode((0.7, 0.2)), ode((0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)), [1.0], *ODD)
    refused = {"stochastic": others, "deterministic": others}
    refused["window"] = (None, 1, [len(plain)], [-1], [0.5], [True], [None], "0", object(), 1 + 2j, {"a": 1})
    return Call(mixed, {"stochastic": noisy, "deterministic": plain, "window": window}, check, refused)


def own_table_call(draw: Draw) -> Call:
    rows = draw.rng.randint(1, 5)
    columns = {name: [draw.rng.uniform(-2.0, 2.0) for _ in range(rows)] for name in ("a", "b", "p", "q", "times")}
    columns["tau"] = [draw.of(0.0, 0.2, 1.5) for _ in range(rows)]
    arguments: dict[str, Any] = {
        name: draw.of(values, torch.tensor(values), np.array(values), tuple(values)) for name, values in columns.items()
    }
    arguments["kind"] = draw.of("gaussian", "unnormalized", "quadratic", ["none"] * rows)

    def check(table: TransitionTable) -> None:
        for name in columns:
            wanted = torch.as_tensor(arguments[name], dtype=F64)
            assert torch.equal(getattr(table, name), wanted)
        kind = arguments["kind"]
        assert table.kind == (tuple(kind) if isinstance(kind, list) else (kind,) * rows)

    refused = {name: ([0.5] * (rows + 1), *NO_COLUMN) for name in columns}
    # One number stands for every row, and what is not known may be left out.
    for name in ("b", "tau", "p", "q", "times"):
        refused[name] = tuple(v for v in refused[name] if v != 1.5 and (name != "times" or v is not None))
    refused["tau"] += ([-0.1] * rows, -0.1)
    refused["kind"] = (None, "normal", ["normal"] * rows, ["gaussian"] * (rows + 1), 1, [1] * rows, *ODD)
    return Call(TransitionTable.from_coefficients, arguments, check, refused)


KINDS = (advantages_call, choice_call, schedule_call, flow_call, diffusion_call, mixed_call, own_table_call)
