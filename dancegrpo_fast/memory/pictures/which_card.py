"""Which card: every size of card against what is trained, each at its own speed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...drawing import figure, title
from ..planning.cards import CARDS, MEANT
from ..planning.iteration import BOUND
from ..planning.planner import Plan, on_cards
from ..planning.settings import GIB, Settings
from ..planning.verdict import GUESSES, NO, YES, state
from .timeline import seconds
from .words import in_a_word, subject

# Where a plan has none, and how many GPUs share all weights.
RANK, SHARED = 32, 8
LOOKS: dict[str, dict[str, Any]] = {
    YES: {"facecolor": "#cfe5df"},
    GUESSES: {"facecolor": "#f5d9bd", "hatch": "...."},
    NO: {"facecolor": "#d5d9de", "hatch": "////"},
}
EDGE: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.5}


class Column(NamedTuple):
    """What is trained, and the plan of it on each card by the card's name."""

    label: str
    plans: Mapping[str, Plan]


def columns(settings: Settings) -> list[Column]:
    """LoRA, LoRA on nf4, and all weights on one and on several GPUs; what the model cannot have is left out."""
    rank = settings.lora or RANK
    strategy = "full_shard" if settings.strategy == "none" else settings.strategy
    alone: dict[str, Any] = {
        "checkpointing": "auto",
        "quantization": "none",
        "fsdp": 1,
        "sequence_parallel": 1,
        "rollout_replica": False,
    }
    lora = alone | {
        "lora": rank,
        "target_modules": settings.target_modules or Settings.target_modules,
        "master_dtype": "none",
    }
    full, width = alone | {"lora": 0, "blocks_to_swap": 0}, ""
    if settings.lora or settings.precision == "bf16":
        # As the trainer takes all weights.
        full |= {"dtype": "float32", "mixed_precision": "bf16", "master_dtype": "none"}
        width = "\nin float32"
    wanted = {
        f"LoRA {rank}": lora,
        f"LoRA {rank}, nf4": lora | {"quantization": "nf4", "dtype": "bfloat16", "mixed_precision": "no"},
        f"all weights{width}": full,
        f"all weights, {SHARED} GPUs{width}": full | {"fsdp": SHARED, "strategy": strategy},
    }
    found = []
    for label, changes in wanted.items():
        try:
            found.append(Column(label, on_cards(settings.changed(**changes), quick=True)))
        except ValueError:
            # Such as 8-bit states on the host.
            continue
    return found


def which_card(plan: Plan) -> Any:
    """Whether each size of card holds it, with how much to spare, how long an iteration takes there, and the policy."""
    return draw(plan.settings, columns(plan.settings))


def draw(settings: Settings, found: Sequence[Column]) -> Any:
    """See `which_card`."""
    from matplotlib.patches import Rectangle

    drawn, panel = figure(0.32 * len(MEANT) + 1.6)
    for x, column in enumerate(found):
        for y, name in enumerate(MEANT):
            plan, card = column.plans[name], CARDS[name]
            spare = card.gib - plan.total_bytes / GIB
            answer = state(plan.peak_bytes, plan.total_bytes, card.gib)
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **LOOKS[answer], **EDGE))
            time = "" if answer == NO else f", {seconds(plan.seconds)}{_star(plan)}"
            centred: dict[str, Any] = {"ha": "center", "color": "black", "fontsize": 6.5}
            middle = 0.0 if answer == NO else -0.04
            panel.text(
                x,
                y + middle,
                f"{spare:+.1f} GiB{time}".replace("-", "\N{MINUS SIGN}"),
                va="center" if answer == NO else "bottom",
                fontweight="normal" if answer == NO else "bold",
                **centred,
            )
            if answer != NO:
                panel.text(x, y + 0.04, in_a_word(plan.policy, plan.settings.blocks_to_swap), va="top", **centred)
    panel.set_xlim(-0.5, len(found) - 0.5)
    panel.set_ylim(len(MEANT) - 0.5, -0.5)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelsize=7)
    panel.xaxis.tick_top()
    panel.set_xticks(range(len(found)), [column.label for column in found])
    panel.set_yticks(range(len(MEANT)), [f"{CARDS[name].size}\n{CARDS[name].label}" for name in MEANT])
    plans = [plan for column in found for plan in column.plans.values()]
    for answer, look in LOOKS.items():
        panel.add_patch(Rectangle((0, 0), 0, 0, label="fits" if answer == YES else answer, **look))
    drawn.legend(loc="outside lower center", ncols=3, handlelength=1.5)
    title(
        panel,
        subject(settings, trained=False),
        "GiB to spare with margins; predicted seconds an iteration at that card's speed",
        *(["*: as long as the host takes to start what it computes"] if any(map(_star, plans)) else []),
        "below: policy of auto, k/n: in k of n blocks the most; host: block inputs there",
        letters=80,
    )
    return drawn


def _star(plan: Plan) -> str:
    return "*" if any(reason.startswith(BOUND) for reason in plan.reasons) else ""
