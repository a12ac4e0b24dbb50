"""Plans a GRPO iteration before there is a GPU, and says what one change would give."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any

from ...activations.checkpointing import NAMED
from ..trace.tracer import collected
from . import passes
from . import policy as policies
from .advice import advice, dominated
from .blocks import compose
from .budget import Advice, Phase, Plan
from .calls import numbers
from .cards import MEANT
from .cases import case_of, kinds_of, resolved
from .iteration import Iteration
from .margins import margins, untraced
from .settings import GIB, Settings
from .sharding import weights_of
from .swapping import choose
from .verdict import Verdict, verdicts

__all__ = ["Plan", "on_cards", "plan", "with_swap", "with_sync"]

# How the reason begins why "auto" reduces after every call.
CALL = "gradient_sync call:"


def with_swap(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """The settings with a number of blocks to swap, which "auto" finds, and why."""
    if settings.blocks_to_swap != "auto":
        return settings, ()

    def attempt(changed: Settings) -> Plan:
        iteration = Iteration(changed)
        # A mixture takes seconds to solve; one policy for all blocks is enough to compare.
        return _plan(iteration, iteration.pick(NAMED))

    case = case_of(settings, 1, "flash", train=True)
    blocks = weights_of(case).blocks
    count, why = choose(settings, len(blocks), bool(kinds_of(resolved(settings.model))), attempt)
    return settings.changed(blocks_to_swap=count), (f"blocks_to_swap auto: {why}",)


def with_sync(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """The settings with "update" or "call" for `gradient_sync`, which "auto" finds where weights are split, and why."""
    if settings.gradient_sync != "auto" or not settings.is_sharded:
        return settings, ()
    found = _asked(settings)[2]
    taken = f"{found.total_bytes / GIB:.1f} of {settings.gpu_gib:.1f} GiB with margins"
    why = [reason for reason in found.reasons if reason.startswith(CALL)] or [f"gradient_sync update: it takes {taken}"]
    return settings.changed(gradient_sync=found.gradient_sync), tuple(why)


def with_passes(settings: Settings) -> tuple[str, str]:
    """What `passes` "1" comes to, "2", "retain" or "reweight", and why."""
    iteration, picked, _ = _asked(settings)
    kind, (why, *_) = passes.choose(iteration, picked.blocks, _phases(iteration, picked))
    return kind, why


def plan(settings: Settings | str, *, advise: bool = True, thorough: bool = False, **changes: Any) -> Plan:
    """Predicts one GRPO iteration on one GPU: `plan("flux-dev", height=720, width=720, lora=32)`.

    Args:
        settings: what is run, or a model, as `Settings` takes it.
        advise: also recompute the plan with each knob changed.
        thorough: also with knobs that need other traces, which takes longer.
        changes: fields of `Settings`.

    Raises:
        ValueError: settings that the model cannot have.
    """
    asked = Settings(settings, **changes) if isinstance(settings, str) else settings.changed(**changes)
    with collected():
        settings, reasons = with_swap(asked)
        iteration, picked, found = _asked(settings)
        found = replace(found, reasons=(*found.reasons, *reasons), cards=_cards(asked, iteration, found))
        if not advise:
            return found
        advised = _advised(iteration, found, picked, thorough)
        return replace(found, advice=advised, reasons=(*found.reasons, *dominated(found, advised)))


def on_cards(settings: Settings, names: Iterable[str] = MEANT, *, quick: bool = False) -> dict[str, Plan]:
    """Predicts one run on each of several cards, at the rates of each; what is traced is traced once.

    Args:
        settings: what is run; capacity, rates and device are the cards'.
        names: of the cards.
        quick: under named policies only, which are traced already.

    Raises:
        ValueError: settings that the model cannot have, or a card that is not known.
    """
    with collected():
        return {name: _asked(with_swap(settings.on(name))[0], quick=quick)[2] for name in names}


Made = tuple[Iteration, policies.Picked, Plan]


def _asked(settings: Settings, *, quick: bool = False) -> Made:
    """The plan of the settings; `quick`: under named policies only."""
    return _reduced(settings, lambda iteration: iteration.pick(NAMED if quick else None))


def _reduced(settings: Settings, pick: Callable[[Iteration], policies.Picked]) -> Made:
    """A plan with gradients reduced as asked, or with "auto" once an update, unless after every call fits or is faster.

    Args:
        settings: what is planned.
        pick: the policy of one that reduces in one of both ways.
    """
    once = _made(Iteration(settings), pick)
    _, picked, found = once
    fits = found.fits(settings.gpu_gib)
    if settings.gradient_sync != "auto" or not settings.is_sharded:
        return once
    if fits and (picked.name == "none" or settings.checkpointing != "auto"):
        return once
    each = _made(Iteration(settings, "call"), pick)
    if not fits:
        why = f"{CALL} once an update takes {found.total_bytes / GIB:.1f} GiB with margins"
    elif each[2].fits(settings.gpu_gib) and each[2].seconds < found.seconds:
        why = f"{CALL} an iteration takes {each[2].seconds:.0f} s, and {found.seconds:.0f} s with more recomputation"
    else:
        return once
    return each[0], each[1], replace(each[2], reasons=(*each[2].reasons, why))


def _made(iteration: Iteration, pick: Callable[[Iteration], policies.Picked]) -> Made:
    picked = pick(iteration)
    return iteration, picked, _plan(iteration, picked)


def _cards(asked: Settings, iteration: Iteration, found: Plan) -> tuple[Verdict, ...]:
    def on(gib: float) -> Plan:
        # The named policies are enough to say whether it fits, and are traced already.
        if asked.blocks_to_swap == "auto" or (asked.gradient_sync == "auto" and asked.is_sharded):
            return _asked(with_swap(asked.changed(gpu_gib=gib))[0], quick=True)[2]
        other = iteration.at(gib)
        return _plan(other, other.pick(NAMED))

    return verdicts(found, on)


def _advised(iteration: Iteration, found: Plan, picked: policies.Picked, thorough: bool) -> tuple[Advice, ...]:
    def again(changed: Settings, same_policy: bool) -> Plan:
        if not same_policy:
            return _asked(changed)[2]
        chosen = list(picked.blocks.policies) if picked.blocks.kinds else picked.blocks.policies[0]
        host = picked.blocks.host_inputs or "block_inputs" in changed.offload

        def same(other: Iteration) -> policies.Picked:
            return replace(picked, blocks=compose(other.replay, chosen, host_inputs=host))

        return _reduced(changed, same)[2]

    def mixed(each: list[Hashable]) -> Plan:
        blocks = compose(iteration.replay, each, host_inputs=picked.blocks.host_inputs)
        return _plan(iteration, replace(picked, blocks=blocks))

    return advice(found, picked.blocks, again, mixed, thorough=thorough)


def _phases(iteration: Iteration, picked: policies.Picked) -> tuple[Phase, ...]:
    """In two passes."""
    settings = iteration.settings
    phases: list[Phase | None] = [iteration.weights()]
    if settings.text_encoders != "precomputed" and iteration.encoders:
        phases.insert(0 if settings.text_encoders == "freed" else 1, iteration.encoding())
    phases += [iteration.rollout(), iteration.decoding(), *iteration.evaluating()]
    if settings.rewards:
        phases.append(iteration.rewarding())
    phases += [*iteration.training(picked.blocks), iteration.step()]
    return tuple(phase for phase in phases if phase is not None)


def _plan(iteration: Iteration, picked: policies.Picked) -> Plan:
    settings, there = iteration.settings, _phases(iteration, picked)
    kind, why = passes.choose(iteration, picked.blocks, there)
    there = passes.applied(iteration, picked.blocks, kind, there)
    held = margins(settings, max(phase.bytes for phase in there)) | untraced(there)
    return Plan(
        iteration.asked,
        there,
        held,
        {name.replace("_", " "): size for name, size in numbers(picked.blocks.saved()).items()},
        picked.name,
        (*picked.reasons, *why, *iteration.reasons, *iteration.bound(picked.blocks)),
        gradient_sync=settings.gradient_sync,
    )
