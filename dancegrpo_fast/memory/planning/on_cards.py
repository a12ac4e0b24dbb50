"""One run on several cards, each at its own speed."""

from collections.abc import Iterable

from ...activations.checkpointing import NAMED
from ..trace.tracer import collected
from .planner import Plan, _asked, with_swap
from .settings import Settings


def on_cards(settings: Settings, names: Iterable[str], *, quick: bool = False) -> dict[str, Plan]:
    """The plan on each of some cards, by the card's name; what is traced is traced once for all of them.

    Args:
        settings: what is run; capacity, rates and device are the cards'.
        names: of the cards.
        quick: `checkpointing auto` chooses among the named policies only; the plan is the card's own otherwise.

    Raises:
        ValueError: settings that the model cannot have, or an unknown card.
    """
    among = NAMED if quick else None
    with collected():
        return {name: _asked(with_swap(settings.on(name), quick=quick)[0], among)[2] for name in names}
