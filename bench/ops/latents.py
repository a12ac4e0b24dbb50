"""What the RL ops are measured on: shapes, latents, model outputs, and what a sampler stored of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf
from bench import peers
from bench.blocks.count import Traffic
from bench.place import Place
from bench.turns import Contest
from dancegrpo_fast.kernels.transition import reference
from tests.tolerances import assert_within_budget

STEPS, INDEX, ETA, SHIFT, SEED = 20, 6, 0.3, 3.0, 1234
BATCHES = (1, 8)
Call = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One shape; latents are float32, as the scripts' are."""

    batch: int
    elements: int
    output_dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.batch}x{self.elements}-{self.output_dtype}".replace("torch.", "")


def cases(place: Place) -> Iterator[Any]:
    """The largest and the smallest in float32, on a GPU the largest in bfloat16 too; the others are marked `full`."""
    few = {(BATCHES[0], place.elements[0], torch.float32), (BATCHES[-1], place.elements[-1], torch.float32)}
    few |= {(BATCHES[-1], place.elements[-1], torch.bfloat16)} if place.gpu else set()
    for elements in reversed(place.elements):
        for batch in reversed(BATCHES):
            for dtype in (torch.float32, torch.bfloat16):
                marks = [] if (batch, elements, dtype) in few else [pytest.mark.full]
                yield pytest.param(Case(batch, elements, dtype), marks=marks)


class Inputs:
    """Several sets of inputs of one case, used in turn.

    Args:
        case: the shape.
        place: how many.
        scored: with next latents and their log-probabilities as sampling would have stored them, so that the ratio is 1
            and nothing is clipped; else with noise.
    """

    def __init__(self, case: Case, place: Place, scored: bool) -> None:
        self.case, self.place, device = case, place, place.device
        generator = torch.Generator(device).manual_seed(0)
        sigmas = dgf.transitions.shifted_sigmas(STEPS, SHIFT)
        self.table = dgf.transitions.dance_sde(sigmas, ETA)
        self.sigmas32 = sigmas.float()
        self.device_sigmas32 = self.sigmas32.to(device)
        per_set = case.batch * case.elements * (12 + case.output_dtype.itemsize)
        self.sets = max(2, -(-place.rotation_bytes // per_set))

        def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
            shape = (self.sets * case.batch, case.elements)
            return torch.split(torch.randn(shape, generator=generator, device=device).to(dtype), case.batch)

        self.latents, self.outputs = draw(), draw(case.output_dtype)
        self.leaves = [v.detach().requires_grad_() for v in self.outputs]
        self.advantages = torch.randn(case.batch, generator=generator, device=device)
        self.noise = () if scored else draw()
        self.next_latents: tuple[Tensor, ...] = ()
        self.old_log_prob: tuple[Tensor, ...] = ()
        if scored:
            pairs = zip(self.latents, self.outputs, strict=True)
            stepped = [dgf.transition_step(x, v, self.table, INDEX, noise=generator) for x, v in pairs]
            self.next_latents = tuple(s.latents for s in stepped)
            self.old_log_prob = tuple(s.log_prob for s in stepped)

    def rows(self) -> Tensor:
        """Of the table in float64, one a sample."""
        return self.table.packed(self.place.device, torch.float64)[INDEX].expand(self.case.batch, -1)

    def few(self) -> range:
        """Sets to look at: plain torch may be right by luck in a single number, but not in eight."""
        return range(min(self.sets, -(-8 // self.case.batch)))

    def peers(self, function: Any) -> dict[str, tuple[Any, Tensor]]:
        """A peer and the sigmas that it reads.

        In eager torch they stay on the host, as in the scripts: arithmetic on them launches nothing. A compiled graph
        reads them on the device.
        """
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=self.place.compiler)
        return {"eager": (function, self.sigmas32), "compile": (compiled, self.device_sigmas32)}

    def assert_scores(self, scored: list[tuple[Tensor, Tensor]]) -> None:
        """Next latents and their log-probabilities, of the first input sets."""
        rows, truth, plain = self.rows(), [], []
        for i, (stored, _) in enumerate(scored):
            x, v = self.latents[i], self.outputs[i]
            truth.append(reference.score(x.double(), v.double(), stored.double(), None, 1.0, rows, None))
            plain.append(peers.flux_step(v, x, ETA, self.sigmas32, INDEX, stored)[2])
        assert_within_budget(torch.cat([log_prob for _, log_prob in scored]), torch.cat(truth), torch.cat(plain))

    def contest(
        self,
        op: str,
        calls: dict[str, Call],
        check: Callable[[str], None],
        least: int,
        more: dict[str, tuple[int, int]],
    ) -> Contest:
        """Contenders of one op.

        Args:
            op: its name.
            calls: contender -> call.
            check: of a contender.
            least: bytes an element that must be moved.
            more: contender -> bytes an element that it must move and does move beside these.
        """
        case, numel = self.case, self.case.batch * self.case.elements
        traffic = Traffic()
        with traffic:
            calls["eager"](0)

        def moved(name: str) -> tuple[int, int | None]:
            must, does = more.get(name, (0, 0))
            minimum = numel * (least + must)
            # Inductor's traffic is not known.
            return minimum, {"eager": traffic.tally.bytes, "compile": None}.get(name, minimum + numel * does)

        facts = {"op": op, "batch": case.batch, "elements": case.elements, "latents_dtype": "float32"}
        facts["output_dtype"] = str(case.output_dtype).removeprefix("torch.")
        return Contest(calls, check, lambda name: facts, self.place.clock(self.sets), moved, self.sets)
