"""What is measured: ops, shapes, dtypes, the contenders of each, and the bytes each must move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dancegrpo_fast as dgf
from dancegrpo_fast.ops import policy_loss as _loaded_now  # noqa: F401  # not in the middle of a run

from . import peers
from .plan import Plan

STEPS, INDEX, ETA, SHIFT = 20, 6, 0.3, 3.0
CLIP_RANGE, ADVANTAGE_CLIP, SEED = 1e-4, 5.0, 1234
BATCHES = (1, 8)

Call = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    batch: int
    elements: int
    output_dtype: torch.dtype

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.batch} x {self.elements:,} {'bf16' if self.output_dtype == torch.bfloat16 else 'fp32'}"

    def bytes_minimum(self, denoised: bool = False) -> int:
        """Each input read once by each pass that must read it, each output written once; latents are float32."""
        v, numel = self.output_dtype.itemsize, self.batch * self.elements
        step = 4 + v + 4 + (4 if denoised else 0)
        score = 4 + v + 4
        each = {"step": step, "step_given_noise": step + 4, "log_prob": score, "policy_loss": 2 * score + v}
        return numel * each[self.op]


def cases(quick: bool, plan: Plan) -> Iterator[Case]:
    """All cases, or the largest and the smallest of each op in float32, and on a GPU the largest in bfloat16 too."""
    for op in plan.ops:
        for elements in plan.elements:
            for batch in BATCHES:
                for dtype in (torch.float32, torch.bfloat16):
                    smallest = (batch, elements) == (BATCHES[0], plan.elements[0])
                    largest = (batch, elements) == (BATCHES[-1], plan.elements[-1])
                    in_quick = smallest or largest if dtype == torch.float32 else largest and plan.bfloat16
                    if not quick or in_quick:
                        yield Case(op, batch, elements, dtype)


class Inputs:
    """Several sets of inputs of one case, used in turn."""

    def __init__(self, case: Case, plan: Plan) -> None:
        device = plan.device
        generator = torch.Generator(device).manual_seed(0)
        self.sigmas = dgf.transitions.shifted_sigmas(STEPS, SHIFT)
        self.table = dgf.transitions.dance_sde(self.sigmas, ETA)
        self.sigmas32 = self.sigmas.float()
        self.device_sigmas32 = self.sigmas32.to(device)
        per_set = case.batch * case.elements * (12 + case.output_dtype.itemsize)
        self.sets = max(2, -(-plan.rotation_bytes // per_set))
        rows = self.sets * case.batch

        def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
            drawn = torch.randn(rows, case.elements, generator=generator, device=device).to(dtype)
            return torch.split(drawn, case.batch)

        self.latents = draw()
        self.outputs = draw(case.output_dtype)
        self.leaves = [v.detach().requires_grad_() for v in self.outputs]
        self.advantages = torch.randn(case.batch, generator=generator, device=device)
        scored = case.op in ("log_prob", "policy_loss")
        # What sampling would have stored, so that the ratio is 1 and nothing is clipped.
        self.noise = () if scored else draw()
        self.next_latents: tuple[Tensor, ...] = ()
        self.old_log_prob: tuple[Tensor, ...] = ()
        if scored:
            stepped = [
                dgf.transition_step(x, v, self.table, INDEX, noise=generator)
                for x, v in zip(self.latents, self.outputs, strict=True)
            ]
            self.next_latents = tuple(s.latents for s in stepped)
            self.old_log_prob = tuple(s.log_prob for s in stepped)


# A peer's function and the sigmas it reads. In eager torch they stay on the host, as in the scripts: arithmetic on them
# launches nothing. A compiled graph reads them on the device.
Peer = Callable[..., tuple[Tensor, ...]]


def _peers(function: Any, inputs: Inputs, plan: Plan) -> dict[str, tuple[Any, Tensor]]:
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=plan.compiler)
    return {
        "eager": (function, inputs.sigmas32),
        "compile": (compiled, inputs.device_sigmas32),
    }


def _step_contenders(case: Case, inputs: Inputs, plan: Plan) -> dict[str, Call]:
    given = case.op == "step_given_noise"

    def peer(step: Peer, sigmas: Tensor) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            noise = inputs.noise[i] if given else None
            with torch.no_grad():
                x, _, log_prob = step(inputs.outputs[i], inputs.latents[i], ETA, sigmas, INDEX, None, noise)
            return x, log_prob

        return call

    def ours(source: str, backend: str, denoised: bool = False) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            result = dgf.transition_step(
                inputs.latents[i],
                inputs.outputs[i],
                inputs.table,
                INDEX,
                seed=SEED if source == "seed" else None,
                noise=inputs.noise[i] if source == "given" else None,
                return_denoised=denoised,
                backend=backend,
            )
            return result.latents, result.log_prob

        return call

    found = {name: peer(*pair) for name, pair in _peers(peers.flux_step, inputs, plan).items()}
    for name, backend in plan.implementations.items():
        found[name] = ours("given" if given else "seed", backend)
        if plan.variants:
            found[f"{name}, x0 too"] = ours("given" if given else "seed", backend, denoised=True)
        if plan.variants and not given:
            found[f"{name}, torch noise"] = ours("torch", backend)
    return found


def _score_contenders(inputs: Inputs, plan: Plan) -> dict[str, Call]:
    def peer(step: Peer, sigmas: Tensor) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            with torch.no_grad():
                return (step(inputs.outputs[i], inputs.latents[i], ETA, sigmas, INDEX, inputs.next_latents[i])[2],)

        return call

    def ours(backend: str) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            x, v, x_next = inputs.latents[i], inputs.outputs[i], inputs.next_latents[i]
            return (dgf.transition_log_prob(x, v, x_next, inputs.table, INDEX, backend=backend),)

        return call

    found = {name: peer(*pair) for name, pair in _peers(peers.flux_step, inputs, plan).items()}
    return found | {name: ours(backend) for name, backend in plan.implementations.items()}


def _loss_contenders(inputs: Inputs, plan: Plan) -> dict[str, Call]:
    def differentiate(i: int, loss: Tensor) -> tuple[Tensor, ...]:
        loss.backward()
        leaf = inputs.leaves[i]
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        return loss, grad

    def peer(loss: Callable[..., Tensor], sigmas: Tensor) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            value = loss(
                inputs.leaves[i],
                inputs.latents[i],
                ETA,
                sigmas,
                INDEX,
                inputs.next_latents[i],
                inputs.old_log_prob[i],
                inputs.advantages,
                CLIP_RANGE,
                ADVANTAGE_CLIP,
            )
            return differentiate(i, value)

        return call

    def ours(backend: str) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            result = dgf.policy_loss(
                inputs.latents[i],
                inputs.leaves[i],
                inputs.next_latents[i],
                inputs.table,
                INDEX,
                inputs.old_log_prob[i],
                inputs.advantages,
                clip_range=CLIP_RANGE,
                advantage_clip=ADVANTAGE_CLIP,
                backend=backend,
            )
            return differentiate(i, result.loss)

        return call

    found = {name: peer(*pair) for name, pair in _peers(peers.policy_loss, inputs, plan).items()}
    return found | {name: ours(backend) for name, backend in plan.implementations.items()}


def contenders(case: Case, inputs: Inputs, plan: Plan) -> dict[str, Call]:
    """Name -> call on one input set; a step gives (x', log_prob), a score (log_prob), a loss (loss, gradient)."""
    if case.op == "policy_loss":
        return _loss_contenders(inputs, plan)
    return _score_contenders(inputs, plan) if case.op == "log_prob" else _step_contenders(case, inputs, plan)
