"""All blocks of a model with what each of them keeps, composed of the ladders of `phases`."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from .phases import Case, Kind, Ladder, Moment, Summary, Vector, added, kinds_of, ladder, resolved


@dataclass(frozen=True)
class Blocks:
    """All blocks of a model with what each of them keeps: the composition of ladders.

    Attributes:
        kinds: of blocks.
        order: the kind of each block, in order.
        policies: of each block; where the model has no kinds, one for the whole.
        ladders: by policy.
        host_inputs: inputs of checkpointed blocks are on the host, but for those of two.
    """

    kinds: tuple[Kind, ...]
    order: tuple[int, ...]
    policies: tuple[Hashable, ...]
    ladders: dict[Hashable, Ladder]
    host_inputs: bool = False

    def _sum(self, of: Callable[[Summary], Mapping[str, float]], key: Hashable) -> Vector:
        """What is linear in all blocks; `key` is the policy that the rest is taken from."""
        start = self.ladders[key]
        parts: list[tuple[float, Mapping[str, float]]] = [(1, of(start.base))]
        parts += [(-n, slope) for n, slope in zip(start.least, start.slope(of), strict=True)]
        slopes = {policy: found.slope(of) for policy, found in self.ladders.items()}
        blocks = Counter(zip(self.order, self.policies, strict=True)) if self.kinds else {}
        parts += [(n, slopes[policy][kind]) for (kind, policy), n in blocks.items()]
        return added(*parts)

    def flops(self, phase: str) -> Vector:
        """By group, of a phase, "recompute" among them."""
        return self._sum(lambda s: s.flops.get(phase, {}), self.policies[0])

    def traffic(self, phase: str) -> Vector:
        """Bytes that a phase reads and writes, by group."""
        return self._sum(lambda s: s.traffic.get(phase, {}), self.policies[0])

    def saved(self) -> Vector:
        """What the forward keeps, by the group of the operators that made it."""
        return self._sum(lambda s: s.saved, self.policies[0])

    def static(self) -> Vector:
        """What is there before the call."""
        return self._sum(lambda s: s.static, self.policies[0])

    def moments(self, phase: str) -> list[Moment]:
        """The peak before, in each of, and after the blocks, in the order in which they run."""
        if not self.kinds:
            return [
                moment for (name, _), moment in self.ladders[self.policies[0]].base.regions.items() if name == phase
            ]
        ends = [
            self._end(phase, name, key) for name, key in (("before", self.policies[0]), ("after", self.policies[-1]))
        ]
        inner = [self._moment(phase, i) for i in range(len(self.order))]
        found = [*ends[:1], *inner, *ends[1:]]
        if phase == "backward":
            found.reverse()
        return [moment for moment in found if moment is not None]

    def peak(self, phase: str) -> Moment:
        """The largest of `moments`."""
        return max(self.moments(phase), key=lambda moment: sum(moment.bytes.values()))

    def _end(self, phase: str, name: str, key: Hashable) -> Moment | None:
        region = phase, name
        moment = self.ladders[key].base.regions.get(region)
        if moment is None or any(region not in s.regions for found in self.ladders.values() for s in found.more):
            return None
        bytes_ = self._sum(lambda s: s.regions[region].bytes, key)
        fixed = added((1, moment.bytes), *self._without(key, lambda s: s.regions[region].bytes))
        return Moment(self._on_device(bytes_, fixed), moment.op, moment.module)

    def _without(self, key: Hashable, of: Callable[[Summary], Mapping[str, float]]) -> list[tuple[float, Vector]]:
        found = self.ladders[key]
        return [(-n, slope) for n, slope in zip(found.least, found.slope(of), strict=True)]

    def _moment(self, phase: str, i: int) -> Moment | None:
        kind, policy = self.order[i], self.policies[i]
        region = phase, str(kind)
        here = self.ladders[policy]
        if region not in here.base.regions:
            return None
        base = here.base.regions[region]

        def of(summary: Summary) -> Mapping[str, float]:
            return summary.regions[region].bytes

        fixed = added(
            (1, base.bytes),
            *((-(n - (k == kind)), slope) for k, (n, slope) in enumerate(zip(here.least, here.slope(of), strict=True))),
        )
        slopes = {policy: found.slope(of) for policy, found in self.ladders.items()}
        static = here.slope(lambda s: s.static)
        before = Counter(zip(self.order[:i], self.policies[:i], strict=True))
        later = Counter(self.order[i + 1 :])
        bytes_ = added(
            (1, fixed),
            *((n, slopes[p][k]) for (k, p), n in before.items()),
            *((n, static[k]) for k, n in later.items()),
        )
        start = sum(k.blocks for k in self.kinds[:kind])
        place = i - start + self.kinds[kind].start
        module = re.sub(r"^(\w+)\.\d+", rf"\g<1>.{place}", base.module)
        return Moment(self._on_device(bytes_, fixed), base.op, module)

    def _on_device(self, bytes_: Vector, fixed: Vector) -> Vector:
        """Without the block inputs that wait on the host; the next block's come while this one runs."""
        if not self.host_inputs:
            return bytes_
        most = max(self.input_bytes(kind) for kind in range(len(self.kinds)))
        return bytes_ | {"block inputs": min(bytes_.get("block inputs", 0), fixed.get("block inputs", 0) + most)}

    def input_bytes(self, kind: int) -> float:
        """That checkpointing one block of this kind keeps."""
        found = [p.slope(lambda s: s.saved)[kind].get("block_inputs", 0) for p in self.ladders.values()]
        return max(found)


def compose(case: Case, policies: Hashable | list[Hashable], *, host_inputs: bool = False) -> Blocks:
    """All blocks of a model under one policy, or one policy each.

    Raises:
        ValueError: another number of policies than blocks.
    """
    kinds = kinds_of(resolved(case.spec))
    order = tuple(i for i, kind in enumerate(kinds) for _ in range(kind.blocks))
    given = tuple(policies) if isinstance(policies, list) else (policies,) * max(1, len(order))
    chosen: tuple[Hashable, ...] = given if kinds else given[:1]
    if kinds and len(chosen) != len(order):
        raise ValueError(f"policies: got {len(chosen)}, want one for each of the {len(order)} blocks")
    return Blocks(kinds, order, chosen, {p: ladder(case, p) for p in dict.fromkeys(chosen)}, host_inputs)
