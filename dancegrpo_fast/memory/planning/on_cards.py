"""One run on several cards, each at its own speed."""

from collections.abc import Iterable

from ...activations.checkpointing import NAMED
from ..trace.tracer import collected
from .iteration import Iteration
from .planner import Plan, _plan, with_swap
from .settings import Settings


def on_cards(settings: Settings, names: Iterable[str]) -> dict[str, Plan]:
    """The plan on each of some cards, by the card's name.

    `checkpointing auto` chooses among the named policies, which are traced once for all of them.

    Raises:
        ValueError: settings that the model cannot have, or an unknown card.
    """
    found = {}
    with collected():
        for name in names:
            iteration = Iteration(with_swap(settings.on(name))[0])
            found[name] = _plan(iteration, iteration.pick(NAMED))
    return found
