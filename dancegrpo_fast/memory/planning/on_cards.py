"""One run on several cards, each at its own speed."""

from collections.abc import Iterable

from ..trace.tracer import collected
from .planner import Iteration, Plan, _plan
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
            iteration = Iteration(settings.on(name))
            found[name] = _plan(iteration, iteration.pick(iteration.settings.gpu_gib))
    return found
