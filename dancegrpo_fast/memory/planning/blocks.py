"""All blocks of a model with what each of them keeps, composed of the traces of `phases`."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from .calls import EXTRA, Moment, Summary, Vector, added, grown, rest_of, small
from .cases import Case, Kind, kinds_of, least_of, resolved


@dataclass(frozen=True)
class Blocks:
    """All blocks of a model with what each of them keeps.

    Attributes:
        kinds: of blocks.
        least: how many of each kind the smallest model has.
        order: the kind of each block, in order.
        policies: of each block; where the model has no kinds, one for the whole.
        bases: of the smallest model, by policy.
        more: with one more block, by its policy and kind.
        host_inputs: inputs of checkpointed blocks are on the host, but for those of two.
    """

    kinds: tuple[Kind, ...]
    least: tuple[int, ...]
    order: tuple[int, ...]
    policies: tuple[Hashable, ...]
    bases: dict[Hashable, Summary]
    more: dict[tuple[Hashable, int], Summary]
    host_inputs: bool = False

    def slope(self, of: Callable[[Summary], Mapping[str, float]], policy: Hashable, kind: int) -> Vector:
        """What one more block of a kind adds under a policy."""
        return added((1, of(self.more[policy, kind])), (-1, of(self.bases[rest_of(policy)])))

    def _bare(self, of: Callable[[Summary], Mapping[str, float]], rest: Hashable) -> Vector:
        """What is there without any block."""
        parts = [(-n, self.slope(of, rest, kind)) for kind, n in enumerate(self.least)]
        return added((1, of(self.bases[rest])), *parts)

    def _sum(self, of: Callable[[Summary], Mapping[str, float]], policy: Hashable = None) -> Vector:
        """What is linear in all blocks; `policy` is that of the block which the rest is taken beside."""
        if not self.kinds:
            return dict(of(self.bases[self.policies[0]]))
        rest = rest_of(self.policies[0] if policy is None else policy)
        blocks = Counter(zip(self.order, self.policies, strict=True))
        return added(
            (1, self._bare(of, rest)), *((n, self.slope(of, policy, kind)) for (kind, policy), n in blocks.items())
        )

    def flops(self, phase: str) -> Vector:
        """By group, of a phase, "recompute" among them."""
        return self._sum(lambda s: s.flops.get(phase, {}))

    def traffic(self, phase: str) -> Vector:
        """Bytes that a phase reads and writes, by group."""
        return self._sum(lambda s: s.traffic.get(phase, {}))

    def launches(self, phase: str) -> float:
        """Kernels that a phase starts."""
        return self._sum(lambda s: {"": s.launches.get(phase, 0)})[""]

    def saved(self) -> Vector:
        """What the forward keeps, by the group of the operators that made it."""
        return self._sum(lambda s: s.saved)

    def kept(self) -> Vector:
        """What there is more after a forward than before it."""
        return added((1, self._sum(lambda s: s.kept)), (-1, self.static()))

    def static(self) -> Vector:
        """What is there before the call."""
        return self._sum(lambda s: s.static)

    def moments(self, phase: str) -> list[Moment]:
        """The peak before, in each of, and after the blocks, in the order in which they run."""
        if not self.kinds:
            found = self.bases[self.policies[0]].regions
            return [moment for (name, _), moment in found.items() if name == phase]
        first, last = (
            self._end(phase, name, policy)
            for name, policy in (("before", self.policies[0]), ("after", self.policies[-1]))
        )
        moments = [first, *self._inner(phase), last]
        if phase == "backward":
            moments.reverse()
        return [moment for moment in moments if moment is not None]

    def peak(self, phase: str) -> Moment:
        """The largest of `moments`."""
        return max(self.moments(phase), key=lambda moment: sum(moment.bytes.values()))

    def _end(self, phase: str, name: str, policy: Hashable) -> Moment | None:
        region = phase, name
        if any(region not in s.regions for s in (*self.bases.values(), *self.more.values())):
            return None

        def of(summary: Summary) -> Mapping[str, float]:
            return summary.regions[region].bytes

        there = self.bases[rest_of(policy)].regions[region]
        bytes_ = self._on_device(self._sum(of, policy), self._bare(of, rest_of(policy)))
        return Moment(bytes_, there.op, there.module)

    def _inner(self, phase: str) -> list[Moment | None]:
        """In each block: what its trace has without its other blocks, and what those that ran before it keep."""
        kept = {key: self.slope(lambda s: s.kept, *key) for key in self.more}
        static = {kind: self.slope(lambda s: s.static, policy, kind) for policy, kind in self.more}
        own = {key: self._own(phase, *key, kept, static) for key in set(zip(self.policies, self.order, strict=True))}
        later = Counter(self.order)
        before: Vector = {}
        found: list[Moment | None] = []
        for i, key in enumerate(zip(self.policies, self.order, strict=True)):
            kind = key[1]
            later[kind] -= 1
            moment = own[key]
            if moment is not None:
                bytes_ = added((1, moment.bytes), (1, before), *((n, static[k]) for k, n in later.items() if n))
                place = i - self.order.index(kind) + self.kinds[kind].start
                module = re.sub(r"^(\w+)\.\d+", rf"\g<1>.{place}", moment.module)
                found.append(Moment(self._on_device(bytes_, moment.bytes), moment.op, module))
            before = added((1, before), (1, kept[key]))
        return found

    def _own(
        self,
        phase: str,
        policy: Hashable,
        kind: int,
        kept: dict[tuple[Hashable, int], Vector],
        static: dict[int, Vector],
    ) -> Moment | None:
        moment = self.more[policy, kind].regions.get((phase, EXTRA))
        if moment is None:
            return None
        rest = rest_of(policy)
        # The block more is the second of its kind.
        parts = [(-n, kept[rest, k]) for k, n in enumerate(self.least[:kind])] + [(-1, kept[rest, kind])]
        parts += [(-(self.least[kind] - 1), static[kind])]
        parts += [(-n, static[k]) for k, n in enumerate(self.least) if k > kind]
        return Moment(added((1, moment.bytes), *parts), moment.op, moment.module)

    def _on_device(self, bytes_: Vector, fixed: Vector) -> Vector:
        """Without the block inputs that wait on the host; the next block's come while this one runs."""
        if not self.host_inputs:
            return bytes_
        most = max(self.input_bytes(kind) for kind in range(len(self.kinds)))
        return bytes_ | {"block inputs": min(bytes_.get("block inputs", 0), fixed.get("block inputs", 0) + most)}

    def host_bytes(self) -> float:
        """Inputs of all checkpointed blocks, which go to the host and come back."""
        if not self.host_inputs:
            return 0.0
        pairs = zip(self.order, self.policies, strict=True)
        return sum(self.input_bytes(kind) for kind, policy in pairs if policy != "none")

    def input_bytes(self, kind: int) -> float:
        """That checkpointing one block of this kind keeps."""
        return max(
            self.slope(lambda s: s.saved, policy, of).get("block_inputs", 0) for policy, of in self.more if of == kind
        )


def compose(case: Case, policies: Hashable | list[Hashable], *, host_inputs: bool = False) -> Blocks:
    """All blocks of a model under one policy, or one policy each.

    Raises:
        ValueError: another number of policies than blocks.
    """
    kinds = kinds_of(resolved(case.spec))
    order = tuple(i for i, kind in enumerate(kinds) for _ in range(kind.blocks))
    given = tuple(policies) if isinstance(policies, list) else (policies,) * max(1, len(order))
    if not kinds:
        return Blocks((), (), (), given[:1], {given[0]: small(case, given[0])}, {}, host_inputs)
    if len(given) != len(order):
        raise ValueError(f"policies: got {len(given)}, want one for each of the {len(order)} blocks")
    rests = dict.fromkeys(rest_of(policy) for policy in given)
    wanted: list[tuple[Hashable, int]] = [(rest, kind) for rest in rests for kind in range(len(kinds))]
    wanted += zip(given, order, strict=True)
    return Blocks(
        kinds,
        least_of(resolved(case.spec)),
        order,
        given,
        {rest: small(case, rest) for rest in rests},
        {(policy, kind): grown(case, policy, kind) for policy, kind in dict.fromkeys(wanted)},
        host_inputs,
    )
