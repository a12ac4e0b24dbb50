"""Fuzzed calls of `policy_loss`, and the objective written anew in float64 from what is published."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast import policy_loss

from ..tolerances import assert_within_budget
from .fuzz_draws import F32, F64, INF, NAN, NO_SWITCH, ODD, Call, Draw, no_number, no_tensor
from .fuzz_transition import Step, a_next, chained, leaves_of


class Objective:
    """The settings of a loss, and its terms in any dtype."""

    def __init__(self, draw: Draw, step: Step, stored: Tensor) -> None:
        self.step, self.stored, batch = step, stored, len(stored)
        self.clip = draw.of(1e-4, 0.2, (1e-3, 0.3), INF)
        self.limit = draw.of(5.0, 1.0, INF)
        # Exact in float32, which is what a call in it computes with.
        self.advantages = draw.normal(batch).to(draw.of(F32, F64)) * draw.of(1.0, 4.0, 0.0)
        self.weight = draw.of(None, 0.5, "per sample")
        if self.weight == "per sample":
            self.weight = torch.tensor([draw.of(0.0, 1.0, 0.7) for _ in range(batch)])
        self.kl_weight = draw.of(0.0, 0.0, 0.3)
        self.reference = draw.laid_out(*stored.shape) if self.kl_weight or draw.maybe(0.2) else None
        self.norm = step.table.has_step_size and draw.maybe(0.3)
        self.old_output = step.output.float() + 0.01 * draw.normal(*stored.shape) if self.norm else None
        # Inside the clip, at its middle and far outside, on either side.
        self.offset = torch.tensor([draw.of(0.0, 3e-5, -3e-5, 0.05, -0.05, 1.0, -1.0) for _ in range(batch)])

    @property
    def weights(self) -> Tensor:
        """`[B]` in float64."""
        weight = 1.0 if self.weight is None else self.weight
        return torch.as_tensor(weight, dtype=F64).expand(len(self.stored))

    def row(self, name: str, dtype: torch.dtype) -> Tensor:
        """A column of the table in each sample's row, as held in `dtype`; of the score, half its inverse variance."""
        step = self.step
        column = -step.coefficients()[0] if name == "precision" else getattr(step.table, name)[step.rows]
        return column.to(dtype).double()

    def log_ratio(self, log_prob: Tensor, old: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        """Of GRPO-Guard where asked for: the mean's shift put back, times tau."""
        found = log_prob.double() - old.double()
        if self.old_output is None:
            return found
        moved = self.row("precision", dtype) * self.mean_square(v, self.old_output.to(dtype), dtype)
        return (found + moved) * self.row("tau", dtype)

    def mean_square(self, v: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
        moved = self.step.mean_of(v, dtype)[0] - self.step.mean_of(other, dtype)[0]
        return moved.double().square().flatten(1).mean(1)

    def terms(self, log_prob: Tensor, old: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every number of the result, given the log-probability, and the factors of its gradient in the velocity."""
        step, weights, batch = self.step, self.weights, len(self.stored)
        b, precision = self.row("b", dtype), self.row("precision", dtype)
        v = step.velocity(step.output, dtype, step.uncond)
        counts = weights != 0
        log_ratio = self.log_ratio(log_prob, old, v, dtype)
        rho = log_ratio.exp()
        low, high = self.clip if isinstance(self.clip, tuple) else (self.clip, self.clip)
        advantage = self.advantages.double().clamp(-self.limit, self.limit)
        unclipped = -advantage * rho
        bounded = -advantage * rho.clamp(1.0 - low, 1.0 + high)
        divisor = self.row("step_size", dtype) if self.norm else torch.ones_like(weights)
        kl = torch.zeros(batch, dtype=F64)
        if self.reference is not None:
            apart = (v - self.reference.to(dtype)).double().square().flatten(1).mean(1)
            kl = precision * b.square() * apart
        policy = torch.maximum(unclipped, bounded)
        each = policy / divisor + (self.kl_weight * kl if self.kl_weight else 0.0)
        zero = torch.zeros((), dtype=F64)

        def average(values: Tensor) -> Tensor:
            return torch.where(counts, values.double(), zero).sum() / counts.sum().clamp(min=1)

        slope = self.row("tau", dtype) if self.norm else torch.ones_like(weights)
        alive = counts & (unclipped >= bounded)
        by_score = torch.where(alive, weights / batch / divisor * unclipped * slope, zero)
        numel = self.stored[0].numel()
        return {
            "loss": torch.where(counts, weights * each, zero).sum() / batch,
            "ratio": rho,
            "samples": counts.double().sum(),
            "clip_fraction": average(bounded > unclipped),
            "advantage_clip_fraction": average(self.advantages.double().abs() > self.limit),
            "ratio_mean": average(rho),
            "ratio_max_dev": torch.where(counts, (rho - 1.0).abs(), zero).amax(),
            "approx_kl": average(rho - 1.0 - log_ratio),
            "reference_kl": average(kl),
            "policy_loss": average(policy),
            "by_step": by_score * 2.0 * precision * b / numel,
            "by_pull": weights / batch * self.kl_weight * 2.0 * precision * b.square() / numel,
        }

    def by_velocity(self, terms: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The gradient, elementwise; what is multiplied with 0 is 0."""
        shape = (-1, *(1,) * (self.stored.ndim - 1))
        v = self.step.velocity(self.step.output, dtype, self.step.uncond)
        through = v if self.old_output is None else self.old_output.to(dtype)
        difference = self.stored.to(dtype) - self.step.mean_of(through, dtype)[0]
        grad = terms["by_step"].to(dtype).reshape(shape) * difference
        if self.reference is not None:
            grad = grad + terms["by_pull"].to(dtype).reshape(shape) * (v - self.reference.to(dtype))
        return grad


def loss_call(draw: Draw) -> Call:
    step = Step(draw, noisy=draw.maybe(0.8))
    stored = a_next(draw, step)
    objective = Objective(draw, step, stored)
    dtype = F64 if stored.dtype == F64 else step.dtype
    scale, constant = step.coefficients()
    mean, _ = step.mean_of(step.velocity(step.output, F64, step.uncond), F64)
    log_prob = scale * (stored.double() - mean).square().flatten(1).mean(1) + constant
    old = (log_prob - objective.offset).to(draw.of(F32, F64))
    arguments = step.arguments | {"next_latents": stored, "old_log_prob": old, "advantages": objective.advantages}
    arguments |= {"clip_range": objective.clip, "advantage_clip": objective.limit, "ratio_norm": objective.norm}
    arguments["kl_weight"] = draw.of(objective.kl_weight, np.float64(objective.kl_weight))
    weights = (old[:0], old[:, None], old.bfloat16(), old.long(), old.to("meta"), old.to_sparse(), old.tolist(), *ODD)
    per_sample = (*weights, None, 1.0)
    refused = step.refused | {
        "next_latents": no_tensor(stored),
        "old_log_prob": per_sample,
        "advantages": per_sample,
        "clip_range": ((0.1,), (0.1, 0.1, 0.1), (0.1, -0.1), (NAN, 0.1), (None, 0.1), *no_number(0.0, infinite=True)),
        "advantage_clip": no_number(0.0, infinite=True),
        "kl_weight": no_number(0.0),
        "ratio_norm": NO_SWITCH,
        "weight": (*weights, NAN, INF, True, None, "1", torch.tensor(1.0)),
    }
    for name, value in (("reference_output", objective.reference), ("old_output", objective.old_output)):
        needed = name == "old_output" or objective.kl_weight > 0
        refused[name] = no_tensor(stored, optional=True)
        if value is not None:
            arguments[name] = value
            refused[name] += (None,) if needed else ()
    if objective.weight is not None:
        arguments["weight"] = objective.weight
    silent = (scale == 0) & (objective.weights != 0)
    if bool(silent.any()):
        return Call(policy_loss, arguments, None, {"step": (arguments["step"],)})
    leaves = leaves_of(step, arguments)

    def check(found: Any) -> None:
        step.check_log_prob(found.log_prob, stored, dtype)
        # From here on of the log-probabilities as they are rounded.
        exact, plain = (objective.terms(found.log_prob, old.to(dtype), d) for d in (F64, dtype))
        error = float((plain["ratio"] - exact["ratio"]).abs().max())
        source = {"ratio": error, "ratio_mean": error, "ratio_max_dev": error}
        reach = float((1.0 - 1.0 / exact["ratio"]).abs().max())
        # A difference of numbers near 1, in double.
        source["approx_kl"] = error * reach + torch.finfo(F64).eps
        amounts = objective.advantages.double().abs().clamp(max=objective.limit)
        source["policy_loss"] = error * float(amounts.max())
        divisor = step.table.step_size[step.rows].min() if objective.norm else 1.0
        source["loss"] = source["policy_loss"] * float(objective.weights.abs().max() / divisor)
        results = {"loss": found.loss.detach(), "ratio": found.ratio, **found.metrics._asdict()}
        for name, value in results.items():
            assert_within_budget(value, exact[name], plain[name].to(dtype), source.get(name, 0.0))
        grads = torch.autograd.grad(found.loss, leaves)
        velocities = (objective.by_velocity(terms, d) for terms, d in ((exact, F64), (plain, dtype)))
        wanted = [chained(step, by_velocity, leaves) for by_velocity in velocities]
        for grad, leaf, truth, rounded in zip(grads, leaves, *wanted, strict=True):
            assert_within_budget(grad, truth, rounded.to(leaf.dtype))
        moving = (exact["by_step"] != 0) | (exact["by_pull"] != 0)
        assert torch.equal(found.has_grad, moving)

    return Call(policy_loss, arguments, check, refused)


def spoiled_loss_call(draw: Draw) -> Call:
    """What does not count holds infinities or NaN, and loss and gradient are those of the samples that do.

    An advantage of 0 counts nothing either, however far its ratio has overflown.
    """
    step = Step(draw, noisy=True)
    stored, batch = a_next(draw, step), len(step.latents)
    poison = draw.of(INF, -INF, NAN)
    weight = torch.tensor([draw.of(0.0, 1.0) for _ in range(batch)])
    silent = weight == 0
    spoiled = {"latents": step.latents.clone(), "model_output": step.output.clone(), "next_latents": stored.clone()}
    name = draw.of(*spoiled)
    spoiled[name][silent] = poison
    advantages = torch.tensor([draw.of(0.1, 0.1, 0.0) for _ in range(batch)])
    old = torch.where(advantages == 0, -2000.0, 1.0)
    arguments = step.arguments | {"old_log_prob": old, "advantages": advantages, "weight": weight}
    arguments |= {"rounding": "exact", "clip_range": INF}
    if draw.maybe():
        # A reference that no term reads.
        arguments |= {"kl_weight": 0.0, "reference_output": torch.full_like(stored, poison)}
    clean = arguments | {"latents": step.latents, "next_latents": stored}
    arguments |= spoiled
    leaf = arguments["model_output"] = arguments["model_output"].requires_grad_()

    def check(found: Any) -> None:
        leaf_of_clean = clean["model_output"] = step.output.detach().clone().requires_grad_()
        wanted = policy_loss(**clean)
        assert math.isfinite(found.loss.item()) and torch.equal(found.loss, wanted.loss)
        assert torch.equal(*(torch.autograd.grad(r.loss, x)[0] for r, x in ((found, leaf), (wanted, leaf_of_clean))))
        assert bool((found.has_grad & silent).any()) is False
        for metric in ("samples", "clip_fraction", "ratio_mean", "ratio_max_dev", "approx_kl", "policy_loss"):
            assert torch.equal(getattr(found.metrics, metric), getattr(wanted.metrics, metric)), metric

    return Call(policy_loss, arguments, check, {})
