"""Whether a plan fits a card, and with what: one answer for each size of card."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cards import CARDS, SIZES
from .margins import CONTEXT
from .settings import GIB

if TYPE_CHECKING:
    from .budget import Plan

HOST = " + block inputs on the host"
# The states of an answer.
YES, GUESSES, NO = "yes", "within the guesses", "no"


@dataclass(frozen=True)
class Verdict:
    """One size of card.

    Attributes:
        size: the name of the size, such as "24 GB".
        gib: what torch has of it.
        state: "yes": with the margins; "within the guesses": without them, but for the CUDA context; or "no".
        policy: of checkpointing there.
        spare_bytes: that are free, margins taken off; negative where they are missing.
        seconds: of one iteration, at the speed of the card that was asked for.
    """

    size: str
    gib: float
    state: str
    policy: str
    spare_bytes: int
    seconds: float


def state(exact: float, with_margins: float, gib: float) -> str:
    """Of so many bytes of tensors, and with what is held beside them, on a card of so many GiB."""
    if with_margins <= gib * GIB:
        return YES
    return GUESSES if exact + CONTEXT * GIB <= gib * GIB else NO


def judged(found: "Plan", size: str, gib: float) -> Verdict:
    """A plan on a card."""
    spare = int(gib * GIB) - found.total_bytes
    return Verdict(size, gib, state(found.peak_bytes, found.total_bytes, gib), found.policy, spare, found.seconds)


def verdicts(asked: "Plan", on: Callable[[float], "Plan"]) -> tuple[Verdict, ...]:
    """Of every size of card, and of the one that was asked for among them.

    Args:
        asked: the plan for `settings.gpu_gib`.
        on: the plan of the same run for another capacity in GiB.
    """
    gib = asked.settings.gpu_gib
    mine = CARDS[asked.settings.card].size if asked.settings.card else f"{gib:g} GiB"
    found = [judged(asked, mine, gib)]
    for size, other in SIZES.items():
        if size == mine or other == gib:
            continue
        # What needs no recomputation here needs none where there is more.
        same = asked.policy == "none" and other > gib
        found.append(judged(asked if same else on(other), size, other))
    return tuple(sorted(found, key=lambda verdict: verdict.gib))


def shortened(policy: str) -> str:
    """`15 x attention, 5 x none, 25 x attention` with each policy named once."""
    name, host, _ = policy.partition(HOST)
    counts: Counter[str] = Counter()
    for run in name.split(", "):
        count, times, kept = run.partition(" x ")
        if not times:
            return policy
        counts[kept] += int(count)
    return ", ".join(f"{count} x {kept}" for kept, count in counts.items()) + host


def sentence(asked: "Plan", every: Sequence[Verdict]) -> str:
    """The answer in a line: whether it fits, with how much to spare, and the smallest card that holds it."""
    mine = next(each for each in every if each.gib == asked.settings.gpu_gib)
    s = asked.settings
    count = f"{s.fsdp} x " if s.fsdp > 1 else ""
    card = f"{count}{mine.size}"
    seen = f" ({CARDS[s.card].label}: {mine.gib:.2f} GiB as torch sees it)" if s.card else ""
    spare = mine.spare_bytes / GIB
    if mine.state == YES:
        text = f"Fits {card} with {spare:.1f} GiB to spare{seen}."
    elif mine.state == GUESSES:
        text = f"Within the guesses on {card}: the tensors fit, and {-spare:.1f} GiB of the margins do not{seen}."
    else:
        text = f"Does not fit {card}: {-spare:.1f} GiB are missing{seen}."
    fitting = [each for each in every if each.state == YES]
    if not fitting:
        return f"{text} No card that is known holds it."
    least = fitting[0]
    if least.gib == mine.gib:
        return f"{text} No smaller card holds it."
    change = [] if least.policy == mine.policy else [f"checkpointing {shortened(least.policy)}"]
    share = round(100 * (least.seconds / mine.seconds - 1)) if mine.seconds else 0
    change += [f"{share:+d} % time"] if share else []
    return f"{text} Smallest card: {count}{least.size}{' (' + ', '.join(change) + ')' if change else ''}."


def line(every: Sequence[Verdict]) -> str:
    """The sizes in a line, up to the first that holds it."""
    first = next((i for i, each in enumerate(every) if each.state == YES), len(every) - 1)
    shown = ", ".join(f"{each.size} {each.state}" for each in every[: first + 1])
    return f"cards: {shown}" + (" and every larger one" if first + 1 < len(every) else "")
