"""Inputs of the op tests and the calls that several of them make."""

import importlib
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.kernels.transition import reference
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

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = ("cpu", "reference")
# Steps of every table below.
STEPS = 4
_SIGMAS = shifted_sigmas(STEPS, 3.0)
_ALPHAS = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=F64), 0)
_TIMES = (999, 700, 400, 100)

TABLES: dict[str, TransitionTable] = {
    "dance": dance_sde(_SIGMAS, 0.3),
    "flow": flow_sde(_SIGMAS, 0.7),
    "cps": cps(_SIGMAS, 0.8),
    "ode": ode(_SIGMAS),
    "mixed": mixed(flow_sde(_SIGMAS, 0.7), ode(_SIGMAS), [1, 2]),
    "ddim": ddim(_ALPHAS, _TIMES, 1.0),
    "vp": vp_sde(_ALPHAS, _TIMES, 0.5, "v_prediction"),
}

# One element, a prime, around the reduction's lanes, chunk and block; many samples of little and the reverse.
SHAPES = (
    (3, 1),
    (2, 13),
    (2, 15),
    (2, 16),
    (2, 17),
    (2, 511),
    (2, 512),
    (3, 513),
    (2, 16383),
    (2, 16384),
    (2, 16385),
    (513, 2),
    (1, 40009),
    (2, 4, 9, 7),
    (2, 4, 3, 6, 5),
)

# latents x model output x next latents; the extremes of what mixed-precision training makes
DTYPES = (
    (F32, F32, F32),
    (F32, BF16, F32),
    (F32, F16, BF16),
    (F32, F32, F16),
    (BF16, BF16, BF16),
    (BF16, F32, F32),
    (F16, F16, F16),
    (F16, BF16, F32),
    (F64, BF16, F32),
    (F32, F32, F64),
)


def dtype_id(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


BUILD_LEVEL = {"_cpu": 1, "_cpu_v3": 3, "_cpu_v4": 4}


def builds() -> list:
    """The instruction-set builds, those that this processor cannot run marked as skipped."""
    level = importlib.import_module("dancegrpo_fast._cpu").processor_level()
    return [
        pytest.param(name, marks=pytest.mark.skipif(level < need, reason=f"the processor is x86-64-v{level}"))
        for name, need in BUILD_LEVEL.items()
    ]


@dataclass(frozen=True)
class Case:
    """Every tensor that the ops take, for one batch."""

    latents: Tensor
    output: Tensor
    next_latents: Tensor
    noise: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    weight: Tensor
    reference_output: Tensor
    old_output: Tensor
    sample_ids: Tensor
    uncond: Tensor | None
    guidance: float | None
    step: int | Tensor

    @property
    def scale(self) -> float:
        return 1.0 if self.guidance is None else self.guidance

    @property
    def guided(self) -> dict:
        """Guidance as every op takes it."""
        return {"uncond_output": self.uncond, "guidance_scale": self.guidance}

    def stepped(self, table: TransitionTable) -> tuple:
        """What `transition_step` takes by position."""
        return self.latents, self.output, table, self.step

    def scored(self, table: TransitionTable, output: Tensor | None = None) -> tuple:
        """What `transition_log_prob` takes by position, of another model output where one is given."""
        return self.latents, self.output if output is None else output, self.next_latents, table, self.step

    def lost(self, table: TransitionTable, output: Tensor | None = None) -> tuple:
        """What `policy_loss` takes by position."""
        return *self.scored(table, output), self.old_log_prob, self.advantages

    def leaves(self) -> list[Tensor | None]:
        """Both model outputs, to be differentiated by."""
        return [None if t is None else t.detach().requires_grad_() for t in (self.output, self.uncond)]

    def rows(self, table: TransitionTable, dtype: torch.dtype) -> Tensor:
        """Coefficients of each sample's step."""
        return rows_of(table, self.step, len(self.latents), dtype)

    def map(self, change) -> "Case":
        """`change` applied to every tensor `[B, ...]` of the latents' shape."""
        shape = self.latents.shape
        big = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{n: change(t) for n, t in big.items() if isinstance(t, Tensor) and t.shape == shape and t.ndim > 1}
        )

    def select(self, samples: slice | list[int]) -> "Case":
        """Some of the samples."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t[samples] for n, t in given.items() if isinstance(t, Tensor)})


def rows_of(table: TransitionTable, step: int | Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    indices, index = (step, 0) if isinstance(step, Tensor) else (None, step)
    return reference.table_rows(table.packed(dtype=dtype), indices, index, batch)


def make_case(
    shape: tuple[int, ...],
    table: TransitionTable,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
    *,
    cfg: bool = False,
    step: int | Tensor = 1,
    seed: int = 0,
) -> Case:
    """Random inputs; next latents are a step of `table`, old log-probabilities on all sides of the clip."""
    g = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    batch = shape[0]
    latents, output, noise = draw(dtypes[0]), draw(dtypes[1]), draw(F32)
    uncond, guidance = (draw(dtypes[1]), 4.5) if cfg else (None, None)
    rows = rows_of(table, step, batch, F64)
    scale = 1.0 if guidance is None else guidance
    stored, score, _ = reference.step(latents, output, uncond, scale, rows, noise, dtypes[2], None)
    compute = reference.compute_dtype(latents, output, uncond, stored)
    # Log-ratios inside, outside and far outside of a range of 1e-4; advantages of both signs, some limited.
    offset = torch.tensor([0.0, 5e-5, -5e-5, 4e-4, -4e-4, 4e-3, -4e-3, 0.1], dtype=F64).repeat(batch // 8 + 1)[:batch]
    guided = reference.guided(output, uncond, scale, F64)
    return Case(
        latents=latents,
        output=output,
        next_latents=stored,
        noise=noise,
        old_log_prob=(score - offset).to(compute),
        advantages=(3.0 * torch.randn(batch, generator=g, dtype=F64)).to(compute),
        # A row without noise may be there, but not count.
        weight=torch.where(rows[:, reference.SCALE] == 0, 0.0, torch.rand(batch, generator=g, dtype=F64) + 0.5).to(
            compute
        ),
        reference_output=(guided + 0.1 * draw(F64)).to(dtypes[1]),
        old_output=(guided + 1e-3 * draw(F64)).to(dtypes[1]),
        sample_ids=torch.arange(batch) * 7919 + 3,
        uncond=uncond,
        guidance=guidance,
        step=step,
    )


def sample(case: Case, table: TransitionTable, *, rounding: str = "exact", backend: str = "cpu", **settings):
    """`transition_step` on a case, with its noise unless `seed` is given."""
    draw = {"sample_ids": case.sample_ids} if "seed" in settings else {"noise": case.noise}
    return transition_step(*case.stepped(table), **case.guided, rounding=rounding, backend=backend, **draw, **settings)


def score(case: Case, table: TransitionTable, *, rounding: str = "exact", backend: str = "cpu") -> tuple[Tensor, ...]:
    """Log-probability and the gradients of its weighted sum by the model outputs."""
    leaves = case.leaves()
    guided = case.guided | {"uncond_output": leaves[1]}
    log_prob = transition_log_prob(*case.scored(table, leaves[0]), **guided, rounding=rounding, backend=backend)
    log_prob.backward(case.weight.to(log_prob.dtype))
    return log_prob.detach(), *(t.grad for t in leaves if t is not None)


def train(
    case: Case, table: TransitionTable, *, kl: bool = False, incoming: float = 1.0, backend: str = "cpu", **settings
) -> dict[str, Tensor]:
    """`policy_loss` and its backward with the gradient `incoming` of the loss: every output by name."""
    leaves = case.leaves()
    settings |= case.guided | {"uncond_output": leaves[1]}
    if kl:
        settings.update(reference_output=case.reference_output, kl_weight=0.1)
    if settings.get("ratio_norm"):
        settings.update(old_output=case.old_output)
    result = policy_loss(*case.lost(table, leaves[0]), weight=case.weight, backend=backend, **settings)
    result.loss.backward(torch.full_like(result.loss, incoming))
    found = {"loss": result.loss, "log_prob": result.log_prob, "ratio": result.ratio, "has_grad": result.has_grad}
    found |= {"grad": leaves[0].grad} | ({} if leaves[1] is None else {"grad_uncond": leaves[1].grad})
    found |= {f"metrics.{name}": value for name, value in result.metrics._asdict().items()}
    return {name: value.detach() for name, value in found.items()}


def everything(
    case: Case, table: TransitionTable, *, rounding: str = "exact", backend: str = "cpu"
) -> dict[str, Tensor]:
    """All outputs of one sample, from given and from seeded noise, with gradients of the summed loss."""
    found: dict[str, Tensor] = {}
    for name, settings in (("given", {}), ("seeded", {"seed": 5})):
        step = sample(case, table, rounding=rounding, backend=backend, return_denoised=True, **settings)
        found |= {f"{name}.{field}": value for field, value in step._asdict().items()}
    log_prob, *grads = score(case, table, rounding=rounding, backend=backend)
    found |= {"score": log_prob} | {f"score.grad{i}": grad for i, grad in enumerate(grads)}
    for name, settings in (("plain", {}), ("kl", {"kl": True}), ("norm", {"ratio_norm": True})):
        if name == "norm" and not table.has_step_size:
            continue
        settings |= {"incoming": float(len(case.latents)), "rounding": rounding, "backend": backend}
        found |= {f"{name}.{field}": value for field, value in train(case, table, **settings).items() if value.ndim}
    return found


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor equal bit for bit, apart from strides."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        want = expected[name]
        assert value.dtype == want.dtype and value.shape == want.shape, name
        assert bits(value) == bits(want), name


def bits(value: Tensor) -> bytes:
    """The bytes of a tensor's elements in logical order."""
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
