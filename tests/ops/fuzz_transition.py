"""Fuzzed calls of the reinforcement-learning ops, and what they compute written anew in float64."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast import gaussian_noise, transition_log_prob, transition_step
from dancegrpo_fast.transitions import TransitionTable, cps, dance_sde, ddim, flow_sde, mixed, ode, shifted_sigmas

from ..tolerances import assert_same_noise, assert_within_budget
from .fuzz_draws import (
    BF16,
    F16,
    F32,
    F64,
    NAN,
    NO_DTYPE,
    NO_SWITCH,
    NO_WORD,
    ODD,
    Call,
    Draw,
    no_index,
    no_int,
    no_number,
    no_tensor,
)

_ALPHAS = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=F64), 0)
NO_TABLE = (None, [1.0], torch.zeros(3, 11), "dance_sde", *ODD)


def a_table(draw: Draw, noisy: bool) -> TransitionTable:
    """A sampler of two to six steps, most of which add noise; `noisy`: one in which only the last may not."""
    steps = draw.rng.randint(2, 6)
    sigmas = shifted_sigmas(steps, draw.rng.uniform(1.0, 4.0))
    level = draw.rng.uniform(0.1, 0.9)
    kind = draw.rng.randrange(4 if noisy else 6)
    if kind == 0:
        return dance_sde(sigmas, level)
    if kind == 1:
        return flow_sde(sigmas, level)
    if kind == 2:
        return cps(sigmas, level)
    if kind == 3:
        times = sorted(draw.rng.sample(range(100, 1000), steps), reverse=True)
        return ddim(_ALPHAS, times, level, draw.of("epsilon", "v_prediction", "sample"))
    if kind == 4:
        rows = [[draw.rng.uniform(-1.5, 1.5) for _ in range(steps)] for _ in range(4)]
        tau = [draw.of(0.0, 0.3, 1.0) for _ in range(steps)]
        kinds = [draw.of("gaussian", "unnormalized", "quadratic", "none") for _ in range(steps)]
        return TransitionTable.from_coefficients(*rows[:2], tau, p=rows[2], q=rows[3], kind=kinds)
    return mixed(flow_sde(sigmas, level), ode(sigmas), range(0, steps, 2))


class Step:
    """One denoising step of a batch, and its formula in any dtype; everything that the ops share."""

    def __init__(self, draw: Draw, noisy: bool = False) -> None:
        self.table = a_table(draw, noisy)
        batch = draw.rng.randint(1, 5)
        shape = (batch, *draw.of((1,), (7,), (16,), (3, 5), (2, 3, 4), (2, 2, 3, 3), (513,), (130, 9)))
        dtypes = draw.of((F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F32, F16), (F64, F64), (BF16, F32))
        self.latents, self.output = draw.laid_out(*shape, dtype=dtypes[0]), draw.laid_out(*shape, dtype=dtypes[1])
        self.rounding = draw.of("exact", "exact", "reference") if self.table.has_reference_rounding else "exact"
        self.uncond, self.scale = None, None
        if draw.maybe(0.4):
            self.uncond, self.scale = draw.laid_out(*shape, dtype=dtypes[1]), draw.rng.uniform(0.5, 5.0)
        per_sample = draw.maybe(0.3)
        rows = len(self.table) - noisy
        self.steps = draw.integers(batch, 0, rows) if per_sample else None
        index = draw.rng.randrange(rows)
        self.rows = torch.full((batch,), index) if self.steps is None else self.steps
        self.arguments: dict[str, Any] = {
            "latents": self.latents,
            "model_output": self.output,
            "table": self.table,
            "step": index if self.steps is None else self.steps,
            "rounding": self.rounding,
            "backend": draw.of("cpu", "reference", "auto"),
        }
        self.refused: dict[str, tuple[Any, ...]] = {
            "latents": (torch.zeros(batch), torch.zeros(0, 3), *no_tensor(self.latents)),
            "model_output": no_tensor(self.output),
            "table": NO_TABLE,
            "step": no_index(len(self.table), batch),
            "rounding": NO_WORD,
            "backend": ("cuda", "triton", *NO_WORD),
        }
        if self.uncond is not None:
            # A number that counts as one.
            scale = draw.of(self.scale, np.float64(self.scale))
            self.arguments |= {"uncond_output": self.uncond, "guidance_scale": scale}
            self.refused |= {"uncond_output": no_tensor(self.uncond), "guidance_scale": no_number()}
        else:
            self.refused |= {"uncond_output": (self.output,), "guidance_scale": (2.0,)}

    @property
    def dtype(self) -> torch.dtype:
        """What the call computes in, unless what it stores is wider."""
        inputs = (self.latents, self.output)
        return F64 if F64 in [t.dtype for t in inputs] else F32

    def column(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A coefficient per sample."""
        return values[self.rows].to(dtype).reshape(-1, *(1,) * (self.latents.ndim - 1))

    def velocity(self, output: Tensor, dtype: torch.dtype, uncond: Tensor | None = None) -> Tensor:
        v = output.to(dtype)
        return v if uncond is None else uncond.to(dtype) + float(self.scale) * (v - uncond.to(dtype))

    def mean_of(self, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`a x + b v` and `p x + q v`, with the published rounding of the products where it is asked for."""
        x, table = self.latents.to(dtype), self.table
        a, b, p, q = (self.column(c, dtype) for c in (table.a, table.b, table.p, table.q))
        if self.rounding == "exact":
            return a * x + b * v, p * x + q * v
        products = self.output.dtype if self.uncond is None else F64
        drift, weight, clean = (self.column(c, dtype) for c in (table.drift, table.drift_weight, table.denoised_weight))
        moved, denoised = ((k * v).to(products).to(dtype) for k in (drift, q))
        return a * x + weight * moved + clean * denoised, p * x + denoised

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """`log_prob = scale mean(d^2) + constant` of every sample, by the kinds' definitions."""
        scale, constant = [], []
        for row in self.rows.tolist():
            tau, kind = float(self.table.tau[row]), self.table.kind[row]
            gaussian = kind in ("gaussian", "unnormalized") and tau > 0
            scale.append(-0.5 / tau**2 if gaussian else -1.0 if kind == "quadratic" and tau > 0 else 0.0)
            constant.append(-math.log(tau) - 0.5 * math.log(2 * math.pi) if gaussian and kind == "gaussian" else 0.0)
        return torch.tensor(scale, dtype=F64), torch.tensor(constant, dtype=F64)

    def check_log_prob(self, found: Tensor, stored: Tensor, dtype: torch.dtype) -> None:
        """The score of what was stored."""
        scale, constant = self.coefficients()
        differences = [
            stored.to(d) - self.mean_of(self.velocity(self.output, d, self.uncond), d)[0] for d in (F64, dtype)
        ]
        exact, plain = ((scale * d.double().square().flatten(1).mean(1)) + constant for d in differences)
        assert_within_budget(found, exact, plain.to(dtype), self.score_error(*differences))

    def score_error(self, exact: Tensor, plain: Tensor) -> float:
        """What plain torch's error in the differences, and one rounding of a square, make of a score."""
        scale, _ = self.coefficients()
        off = (plain.double() - exact).abs().flatten(1).amax(1)
        size, square = exact.abs().flatten(1).mean(1), exact.square().flatten(1).mean(1)
        return float((scale.abs() * (2 * size * off + torch.finfo(plain.dtype).eps * square)).max())


def philox_normals(key: int, ids: Tensor, rows: Tensor, count: int) -> Tensor:
    """Philox 4x32-10 and Box-Muller in float64, from the papers, in numpy."""
    mask = np.uint64(0xFFFFFFFF)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    found = []
    for name, row in zip(ids.tolist(), rows.tolist(), strict=True):
        words = [blocks, *(np.full_like(blocks, w) for w in (row, name % 2**32, name % 2**64 >> 32))]
        low, high = key % 2**32, key % 2**64 >> 32
        for _ in range(10):
            first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
            words = [
                (second >> np.uint64(32)) ^ words[1] ^ np.uint64(low),
                second & mask,
                (first >> np.uint64(32)) ^ words[3] ^ np.uint64(high),
                first & mask,
            ]
            low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
        normals = []
        for radius, turn in (words[:2], words[2:]):
            # The uniform is a float32, in which the kernels and their definition agree to the bit.
            uniform = radius.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
            length, angle = np.sqrt(-2.0 * np.log(uniform.astype(np.float64))), turn * (2 * math.pi / 2**32)
            normals += [length * np.cos(angle), length * np.sin(angle)]
        found.append(np.stack(normals, axis=1).reshape(-1)[:count])
    return torch.from_numpy(np.stack(found)).float()


def step_call(draw: Draw) -> Call:
    step = Step(draw)
    batch, shape = len(step.latents), step.latents.shape
    arguments, refused = dict(step.arguments), dict(step.refused)
    out_dtype = draw.of(None, None, F32, BF16, F16, F64)
    stored_dtype = out_dtype or step.latents.dtype
    dtype = F64 if stored_dtype == F64 else step.dtype
    denoised = draw.maybe()
    noise = draw.laid_out(*shape, dtype=draw.of(F32, BF16))
    if draw.maybe():
        seed, ids = draw.rng.randrange(2**63), draw.integers(batch, -(2**63), 2**63)
        arguments |= {"seed": seed, "sample_ids": ids}
        refused["seed"] = no_int(0, 2**63 - 1)[:1] + no_int(0, 2**63 - 1)[1:3] + (1.0, True, torch.tensor(1), *ODD)
        refused["sample_ids"] = (ids.int(), ids.float(), ids[None], torch.cat([ids, ids]), ids.to("meta"), [1], *ODD)
        refused["noise"] = (noise,)
        # The same stream alone, on which the unit noise of one row for each step lies.
        rows = len(step.table)
        unit = TransitionTable.from_coefficients([0.0] * rows, 0.0, 1.0, kind="none")
        zeros = torch.zeros(shape)
        noise = transition_step(
            zeros, zeros, unit, step.rows, seed=seed, sample_ids=ids, backend=arguments["backend"]
        ).latents
        assert_same_noise(noise.flatten(1), philox_normals(seed, ids, step.rows, zeros[0].numel()))
    else:
        arguments["noise"] = noise
        refused["noise"] = no_tensor(noise, optional=True)
        refused["seed"], refused["sample_ids"] = (1,), (torch.arange(batch),)
    if draw.maybe(0.3):
        buffer = torch.full((batch, 2, *shape[1:]), NAN, dtype=stored_dtype)
        arguments["out"] = buffer[:, 1]
        lent = {"latents": step.latents, "model_output": step.output}
        overlapping = tuple(t for t in lent.values() if t.dtype == (out_dtype or t.dtype))
        refused["out"] = (*overlapping, buffer[:, :1, :1].expand(buffer.shape)[:, 0], *no_tensor(buffer[:, 1], True))
        refused["out"] += (buffer[:, 1].clone().requires_grad_(),)
    if out_dtype is not None:
        arguments["out_dtype"] = out_dtype
        refused["out_dtype"] = NO_DTYPE
    arguments["return_denoised"] = denoised
    refused["return_denoised"] = NO_SWITCH

    def check(found: Any) -> None:
        results = []
        for d in (F64, dtype):
            mean, clean = step.mean_of(step.velocity(step.output, d, step.uncond), d)
            tau = step.column(step.table.tau, d)
            results.append((torch.where(tau > 0, mean + tau * noise.to(d), mean), clean))
        assert found.latents.dtype == stored_dtype and (found.denoised is not None) == denoised
        assert_within_budget(found.latents, results[0][0], results[1][0].to(stored_dtype))
        if denoised:
            assert_within_budget(found.denoised, results[0][1], results[1][1].to(stored_dtype))
        step.check_log_prob(found.log_prob, found.latents, dtype)

    return Call(transition_step, arguments, check, refused)


def a_next(draw: Draw, step: Step) -> Tensor:
    """Next latents near the step's mean, in a dtype of their own."""
    mean, _ = step.mean_of(step.velocity(step.output, F64, step.uncond), F64)
    tau = step.column(step.table.tau, F64).clamp(min=0.1)
    return (mean + tau * draw.normal(*mean.shape, dtype=F64)).to(draw.of(F32, BF16, F16, step.latents.dtype))


def leaves_of(step: Step, arguments: dict[str, Any]) -> list[Tensor]:
    """The differentiable outputs, put into the arguments as leaves."""
    names = ["model_output"] + (["uncond_output"] if step.uncond is not None else [])
    for name in names:
        arguments[name] = arguments[name].detach().requires_grad_()
    return [arguments[name] for name in names]


def chained(step: Step, by_velocity: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients by the outputs, given that by the velocity, in whose dtype the scale is held too."""
    if len(leaves) == 1:
        return [by_velocity]
    scale = torch.tensor(float(step.scale), dtype=by_velocity.dtype)
    return [scale * by_velocity, (1.0 - scale) * by_velocity]


def score_call(draw: Draw) -> Call:
    step = Step(draw)
    stored = a_next(draw, step)
    arguments = step.arguments | {"next_latents": stored}
    dtype = F64 if stored.dtype == F64 else step.dtype
    leaves, incoming = leaves_of(step, arguments), draw.normal(len(stored), dtype=dtype)

    def check(found: Tensor) -> None:
        step.check_log_prob(found.detach(), stored, dtype)
        grads = torch.autograd.grad(found, leaves, incoming)
        scale, _ = step.coefficients()
        slope = incoming.double() * -2.0 * scale / stored[0].numel()
        wanted = []
        for d in (F64, dtype):
            difference = stored.to(d) - step.mean_of(step.velocity(step.output, d, step.uncond), d)[0]
            factor = (slope * step.table.b[step.rows]).to(d).reshape(-1, *(1,) * (stored.ndim - 1))
            wanted.append(chained(step, factor * difference, leaves))
        for grad, leaf, exact, plain in zip(grads, leaves, *wanted, strict=True):
            assert_within_budget(grad, exact, plain.to(leaf.dtype))

    refused = step.refused | {"next_latents": no_tensor(stored)}
    return Call(transition_log_prob, arguments, check, refused)


def noise_call(draw: Draw) -> Call:
    shape = tuple(draw.rng.randint(1, 9) for _ in range(draw.rng.randint(1, 4)))
    ids, seed = draw.integers(draw.rng.randint(1, 5), -(2**63), 2**63), draw.rng.randrange(2**63)
    dtype = draw.of(F32, BF16, F16, F64)
    arguments = {"shape": draw.of(shape, list(shape)), "seed": seed, "sample_ids": ids, "dtype": dtype}
    arguments["backend"] = draw.of("cpu", "reference", "auto")

    def check(found: Tensor) -> None:
        assert found.shape == (len(ids), *shape) and found.dtype == dtype
        wide = gaussian_noise(shape, seed=seed, sample_ids=ids, backend=arguments["backend"])
        assert_same_noise(wide.flatten(1), philox_normals(~seed, ids, torch.zeros_like(ids), math.prod(shape)))
        assert torch.equal(found, wide.to(dtype))

    refused = {
        "shape": (None, (), 4, (0, 2), (2, -1), (2.0,), (1,) * 9, (2**40,), (2**70,), torch.zeros(2), *ODD),
        "seed": no_int(0, 2**63 - 1),
        "sample_ids": (None, ids.int(), ids.float(), ids[None], ids[:0], ids.tolist(), ids.numpy(), *ODD),
        "dtype": (None, *NO_DTYPE),
        "backend": ("cuda", "triton", *NO_WORD),
    }
    return Call(gaussian_noise, arguments, check, refused)
