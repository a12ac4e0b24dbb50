"""What is measured: ops, shapes, dtypes, the contenders of each, and the bytes each must move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dancegrpo_fast as dgf
from dancegrpo_fast.ops import policy_loss as _loaded_now  # noqa: F401  # not in the middle of a run

from . import peers

STEPS, INDEX, ETA, SHIFT = 20, 6, 0.3, 3.0
CLIP_RANGE, ADVANTAGE_CLIP, SEED = 1e-4, 5.0, 1234
# The inputs of all sets together are at least this large, so that no cache holds what the next call reads.
ROTATION_BYTES = 192 << 20
ELEMENTS = (16_384, 129_600, 806_400)
BATCHES = (1, 8)
OPS = ("step", "step_given_noise", "policy_loss")

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
        return numel * {"step": step, "step_given_noise": step + 4, "policy_loss": 2 * (4 + v + 4) + v}[self.op]


def cases(quick: bool) -> Iterator[Case]:
    """All cases, or the largest and the smallest of each op."""
    for op in OPS:
        for elements in ELEMENTS:
            for batch in BATCHES:
                for dtype in (torch.float32, torch.bfloat16):
                    smallest = (batch, elements) == (BATCHES[0], ELEMENTS[0])
                    largest = (batch, elements) == (BATCHES[-1], ELEMENTS[-1])
                    if not quick or (dtype == torch.float32 and (smallest or largest)):
                        yield Case(op, batch, elements, dtype)


class Inputs:
    """Several sets of inputs of one case, used in turn."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sigmas = dgf.transitions.shifted_sigmas(STEPS, SHIFT)
        self.table = dgf.transitions.dance_sde(self.sigmas, ETA)
        self.sigmas32 = self.sigmas.float()
        per_set = case.batch * case.elements * (12 + case.output_dtype.itemsize)
        self.sets = max(2, -(-ROTATION_BYTES // per_set))
        rows = self.sets * case.batch

        def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
            drawn = torch.randn(rows, case.elements, generator=generator).to(dtype)
            return torch.split(drawn, case.batch)

        self.latents = draw()
        self.outputs = draw(case.output_dtype)
        self.leaves = [v.detach().requires_grad_() for v in self.outputs]
        self.advantages = torch.randn(case.batch, generator=generator)
        # What sampling would have stored, so that the ratio is 1 and nothing is clipped.
        self.noise = draw() if case.op != "policy_loss" else ()
        self.next_latents: tuple[Tensor, ...] = ()
        self.old_log_prob: tuple[Tensor, ...] = ()
        if case.op == "policy_loss":
            stepped = [
                dgf.transition_step(x, v, self.table, INDEX, noise=generator)
                for x, v in zip(self.latents, self.outputs, strict=True)
            ]
            self.next_latents = tuple(s.latents for s in stepped)
            self.old_log_prob = tuple(s.log_prob for s in stepped)


def _step_contenders(case: Case, inputs: Inputs) -> dict[str, Call]:
    given = case.op == "step_given_noise"

    def peer(step: Callable[..., tuple[Tensor, ...]]) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            noise = inputs.noise[i] if given else None
            with torch.no_grad():
                x, _, log_prob = step(inputs.outputs[i], inputs.latents[i], ETA, inputs.sigmas32, INDEX, None, noise)
            return x, log_prob

        return call

    def ours(source: str, denoised: bool = False) -> Call:
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
            )
            return result.latents, result.log_prob

        return call

    contenders = {
        "eager": peer(peers.flux_step),
        "compile": peer(torch.compile(peers.flux_step, fullgraph=True, dynamic=False)),
    }
    if given:
        return contenders | {"ours": ours("given"), "ours, x0 too": ours("given", denoised=True)}
    return contenders | {
        "ours": ours("seed"),
        "ours, x0 too": ours("seed", denoised=True),
        "ours, torch noise": ours("torch"),
    }


def _loss_contenders(inputs: Inputs) -> dict[str, Call]:
    def differentiate(i: int, loss: Tensor) -> tuple[Tensor, ...]:
        loss.backward()
        leaf = inputs.leaves[i]
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        return loss, grad

    def peer(loss: Callable[..., Tensor]) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            value = loss(
                inputs.leaves[i],
                inputs.latents[i],
                ETA,
                inputs.sigmas32,
                INDEX,
                inputs.next_latents[i],
                inputs.old_log_prob[i],
                inputs.advantages,
                CLIP_RANGE,
                ADVANTAGE_CLIP,
            )
            return differentiate(i, value)

        return call

    def ours(i: int) -> tuple[Tensor, ...]:
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
        )
        return differentiate(i, result.loss)

    return {
        "eager": peer(peers.policy_loss),
        "compile": peer(torch.compile(peers.policy_loss, fullgraph=True, dynamic=False)),
        "ours": ours,
    }


def contenders(case: Case, inputs: Inputs) -> dict[str, Call]:
    """Name -> call on one input set; a step gives (x', log_prob), a loss gives (loss, gradient)."""
    return _loss_contenders(inputs) if case.op == "policy_loss" else _step_contenders(case, inputs)
