"""The solver against enumeration, and its figures against what real models keep."""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dancegrpo_fast.activations.checkpointing import KEEPABLE, Keep, PerBlock, apply, keeps
from dancegrpo_fast.activations.operators import GROUPS, group
from dancegrpo_fast.memory.planning.solve import GIB, BlockFigures, GroupFigures, options_of, solve

from ..activations.policies import MODELS, build, kept
from ..patch.models import FAMILIES, assert_same_bits, run


def _storages(values: Iterable[Any]) -> dict[int, int]:
    found = (t.untyped_storage() for t in tree_leaves(list(values)) if isinstance(t, Tensor))
    return {storage._cdata: storage.nbytes() for storage in found}


class _Figures(TorchDispatchMode):
    """What the ops of one block return, and a cost: FLOPs where torch counts them, else bytes written."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.cost = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
        self.source: dict[int, str] = {}
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = group(func._schema.name)
        # Held, so that no address comes twice.
        self.alive.append(out)
        written = {k: size for k, size in _storages([out]).items() if k not in _storages([args, kwargs])}
        self.source |= dict.fromkeys(written, name)
        if keeps(frozenset({name}), func, args, kwargs or {}):
            self.kept[name] += sum(written.values())
        counted = flop_registry.get(func._overloadpacket)
        self.cost[name] += sum(written.values()) if counted is None else counted(*args, **kwargs or {}, out_val=out)
        return out


def measure(model: Any, inputs: dict[str, Any]) -> list[BlockFigures]:
    """Figures of every block from one forward."""
    figures: list[BlockFigures] = []
    before: dict[int, int] = {}

    def block_with_figures(block: nn.Module, *args: Any) -> Any:
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved.append(tensor)
            return tensor

        counter = _Figures()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
            out = block(*args)
        given = _storages(args)
        new = {key: size for key, size in given.items() if key not in before}
        before.update(given)
        by_group = dict.fromkeys(GROUPS, 0)
        for key, size in _storages(saved).items():
            if key in counter.source:
                by_group[counter.source[key]] += size
        groups = {
            # A saved view of an output that may not be kept counts for no group.
            name: GroupFigures(counter.kept[name], min(by_group[name], counter.kept[name]), counter.cost[name])
            for name in GROUPS
        }
        figures.append(BlockFigures(sum(new.values()), sum(by_group.values()), groups))
        return out

    model.enable_gradient_checkpointing(block_with_figures)
    try:
        model(**inputs, return_dict=False)
    finally:
        model.disable_gradient_checkpointing()
    return figures


def _random_block(draw: random.Random) -> BlockFigures:
    groups = {}
    for name in draw.sample(GROUPS, draw.randint(1, 3)):
        size = draw.randint(0, 20)
        groups[name] = GroupFigures(size, draw.randint(0, size), draw.randint(0, 30))
    saved = sum(group.saved_bytes for group in groups.values()) + draw.randint(0, 10)
    return BlockFigures(draw.randint(0, 5), saved, groups)


def _enumerated(blocks: list[BlockFigures], budget: int, offload: bool) -> tuple[float, int] | None:
    fitting = [
        (sum(option.cost for option in choice), sum(option.kept for option in choice))
        for choice in itertools.product(*(options_of(block, offload) for block in blocks))
        if sum(option.kept for option in choice) + max(option.transient for option in choice) <= budget
    ]
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(200))
def test_optimum(seed: int) -> None:
    draw = random.Random(seed)
    kinds = [_random_block(draw) for _ in range(2)]
    blocks = [draw.choice(kinds) for _ in range(draw.randint(1, 5))]
    budget, offload = draw.randint(0, 150), draw.random() < 0.3
    best = _enumerated(blocks, budget, offload)
    if best is None:
        with pytest.raises(ValueError, match=f"budget_bytes: got {budget} .* want at least") as raised:
            solve(blocks, budget, offload=offload)
        budget = int(str(raised.value).split("want at least ")[1].split()[0])
        assert _enumerated(blocks, budget - 1, offload) is None
        best = _enumerated(blocks, budget, offload)
        assert best is not None
    found = solve(blocks, budget, offload=offload)
    assert (found.cost, found.kept_bytes) == best
    assert found.kept_bytes + found.transient_bytes <= budget
    assert found == solve(blocks, budget, offload=offload)


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("gap", [0.01, 0.3])
def test_within_the_gap_of_the_optimum(seed: int, gap: float) -> None:
    draw = random.Random(seed)
    kinds = [_random_block(draw) for _ in range(3)]
    blocks = [draw.choice(kinds) for _ in range(8)]
    budget = solve(blocks, 2**40).minimum_bytes + draw.randint(0, 60)
    exact, near = solve(blocks, budget), solve(blocks, budget, gap=gap)
    assert near.kept_bytes + near.transient_bytes <= budget
    assert exact.cost <= near.cost <= exact.cost * (1 + gap)


@pytest.mark.parametrize("seed", range(50))
def test_options_leave_out_only_what_others_beat(seed: int) -> None:
    block = _random_block(random.Random(seed))
    options = options_of(block)
    for size in range(len(KEEPABLE) + 1):
        for names in itertools.combinations(KEEPABLE, size):
            groups = [block.groups[name] for name in names if name in block.groups]
            figures = (
                block.input_bytes + sum(group.kept_bytes for group in groups),
                block.saved_bytes - sum(group.saved_bytes for group in groups),
                sum(group.cost for name, group in block.groups.items() if name not in names),
            )
            assert any(all(a <= b for a, b in zip(option[:3], figures, strict=True)) for option in options)


def test_sixty_blocks_of_two_kinds() -> None:
    def block(scale: int) -> BlockFigures:
        sizes = {"attention": (40, 900), "matmul": (310, 2700), "norm": (90, 7), "elementwise": (130, 9)}
        groups = {
            name: GroupFigures(size * scale * 2**20 + scale, size * scale * 2**20, cost * scale)
            for name, (size, cost) in sizes.items()
        }
        return BlockFigures(60 * scale * 2**20, 600 * scale * 2**20, groups)

    blocks = [block(3)] * 20 + [block(2)] * 40
    minimum = solve(blocks, 1000 * GIB).minimum_bytes
    costs = [solve(blocks, minimum + gib * GIB).cost for gib in (0, 5, 10, 20, 40, 80)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    tight = solve(blocks, minimum + 10 * GIB)
    # Those that run first are computed again most.
    per_block = {policy: i for i, policy in enumerate(tight.policies[20:])}
    assert list(per_block.values()) == sorted(per_block.values())
    assert "like block 20: " in tight.explanation and "% of the blocks' forward" in tight.explanation


def test_enough_memory_recomputes_nothing() -> None:
    block = BlockFigures(10, 100, {"matmul": GroupFigures(90, 60, 5.0), "attention": GroupFigures(20, 20, 3.0)})
    found = solve([block] * 3, 3 * 110)
    assert found.policies == (None,) * 3
    assert (found.cost, found.transient_bytes, found.forward_cost) == (0, 0, 24.0)
    # One byte less, and those that run first are checkpointed: one keeps 10 and takes 100 to compute again.
    assert [policy is None for policy in solve([block] * 3, 3 * 110 - 1).policies] == [False, False, True]


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_what_models_keep(name: str) -> None:
    model = build(name)
    figures = measure(model, MODELS[name].inputs())
    base = kept(model, name, "full")
    for policy in (Keep({"attention"}), Keep({"attention", "matmul"})):
        predicted = sum(block.groups[group].kept_bytes for block in figures for group in policy.groups)
        assert kept(model, name, policy) - base == predicted


@pytest.mark.parametrize("name", FAMILIES)
def test_solutions_fit_real_models(name: str) -> None:
    model = build(name)
    inputs = MODELS[name].inputs()
    wanted = run(model, inputs)
    figures = measure(model, inputs)
    least = solve(figures, 2**40).minimum_bytes
    most = sum(block.input_bytes + block.saved_bytes for block in figures)
    costs = []
    for budget in (least, (least + most) // 2, most):
        solution = solve(figures, budget)
        assert solution.kept_bytes + solution.transient_bytes <= budget
        undo = apply(model, PerBlock(solution.policies))
        assert_same_bits(run(model, inputs), wanted)
        costs.append(solution.cost)
        undo()
    assert costs[0] > costs[1] > costs[2] == 0


def test_solutions_with_inputs_on_the_host() -> None:
    model = build("flux")
    inputs = MODELS["flux"].inputs()
    wanted = run(model, inputs)
    figures = measure(model, inputs)
    with_inputs, without = (solve(figures, 2**40, offload=offload).minimum_bytes for offload in (False, True))
    assert without < with_inputs
    apply(model, PerBlock(solve(figures, without, offload=True).policies), offload=True)
    assert_same_bits(run(model, inputs), wanted)


_BLOCK = BlockFigures(1, 2, {"matmul": GroupFigures(2, 1, 1.0)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve([], 1), "blocks: got none"),
        (lambda: solve([_BLOCK], -1), "budget_bytes: got -1, want a finite number of at least 0"),
        (lambda: solve([_BLOCK], float("nan")), "budget_bytes: got nan"),
        (lambda: solve([_BLOCK], 2), r"budget_bytes: got 2 .* want at least 3"),
        (lambda: solve([BlockFigures(-1, 2, {})], 9), r"blocks\[0\].input_bytes: got -1"),
        (lambda: solve([BlockFigures(1, 2, {"mm": GroupFigures(1, 1, 1)})], 9), r"blocks\[0\].groups: got mm"),
        (lambda: solve([BlockFigures(1, 2, {"matmul": GroupFigures(1, 2, 1)})], 9), "saved_bytes: got 2, want at most"),
        (
            lambda: solve([BlockFigures(1, 2, {"matmul": GroupFigures(3, 3, 1)})], 9),
            "saved_bytes: got 2, want at least",
        ),
        (lambda: solve([_BLOCK], 9, gap=1.0), "gap: got 1.0, want a share"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
