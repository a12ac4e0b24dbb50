"""Memory and seconds that other people measured on GPUs and published (`public_rows.jsonl`), and the planner's beside.

A row has what was run in the planner's words (`settings`), the phases that the run went through (`run`), what of the
plan it did not have (`without`), what it had that no setting says (`besides`, by a rule of `EXTRAS`), the number, how
it was read (`kind`), where it stands, and the `cause` where the two are far apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.budget import Phase
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.margins import margins
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.sharding import weights_of

from ..rows import Row, grid, made_with, read
from .extras import EXTRAS

FILE = Path(__file__).with_name("public_rows.jsonl")
PARTS = {
    "A": "Denoiser, weights and states",
    "B": "VAE decodes without tiles",
    "C": "Training, and other runs with quantised weights",
    "E": "Seconds",
}
# How memory was read, and the margins that this leaves out. "allocator": torch's, as other rows of the source show.
OUTSIDE = ("CUDA context", "NCCL")
KINDS = {
    "allocated": (*OUTSIDE, "fragmentation"),
    "allocator": (*OUTSIDE, "fragmentation"),
    "reserved": OUTSIDE,
    "nvidia-smi": (),
    "not said": (),
}
# Low by more than this, a row needs a named cause.
LOW = 0.05
# How far off a plan may be without a cause; of part A where torch's allocated bytes were read, and otherwise.
ALLOCATED = 0.01
BOUNDS = {"A": 0.05, "B": 0.10, "C": 0.10}
TIMES = 1.5
# One sample, one step that is trained on, as scripts have it that ask for nothing else.
ONE = {
    "group_size": 1,
    "num_steps": 1,
    "timestep_fraction": 1.0,
    "checkpointing": "none",
    "vae_tiling": "off",
    "expandable_segments": False,
    "gradient_sync": "call",
}


@dataclass(frozen=True)
class Published:
    """One measurement.

    Attributes:
        part: of `PARTS`.
        what: was run, in words.
        measured: GiB, or seconds in part E.
        kind: one of `KINDS`; "" for seconds.
        source: an address.
        settings: of `Settings`, beside `ONE`.
        run: phases; the largest of them is compared, or the sum of their seconds.
        without: what the plan has and the run had not; see `TAKEN`.
        besides: names in `EXTRAS`.
        taken: as which kind it is compared, where the source does not say.
        cause: why the two differ, where they do.
        not_planned: why there is no plan; "" where there is one.
    """

    part: str
    what: str
    measured: float
    kind: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    run: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    taken: str = ""
    cause: str = ""
    not_planned: str = ""

    def asked(self) -> Settings:
        """What is planned."""
        given = {**ONE, **self.settings}
        for name in ("micro_batch", "rollout_batch"):
            given["group_size"] = max(given["group_size"], given.get(name, 1))
        found = Settings(**_tuples(given))
        return found.on(found.card) if found.card else found

    def missing(self) -> str:
        """Why it cannot be planned, or ""."""
        if self.not_planned:
            return self.not_planned
        if unknown := sorted(set(self.settings) - {one.name for one in fields(Settings)}):
            return f"the planner has no setting {', '.join(unknown)}"
        if not self.settings:
            return "no settings"
        model = self.settings["model"]
        return "" if model in known_models() else f"the planner does not know {model}"


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


@lru_cache
def known_models() -> frozenset[str]:
    """Names that need no hub."""
    return frozenset(name for own in specs.names() for name in (own, specs.resolve(own).hub) if name)


@lru_cache
def rows() -> tuple[Published, ...]:
    """All of them.

    Raises:
        ValueError: a row with a part, kind or extra that is unknown.
    """
    found = []
    for given in read(FILE):
        row = Published(**_tuples(given))
        if row.part not in PARTS or (row.kind not in KINDS and row.part != "E"):
            raise ValueError(f"{FILE.name}: got part {row.part} and kind {row.kind} of {row.what}, want known ones")
        if unknown := set(row.besides) - set(EXTRAS):
            raise ValueError(f"{FILE.name}: got {', '.join(unknown)} beside {row.what}, want some of {list(EXTRAS)}")
        found.append(row)
    return tuple(found)


# What a plan has and a run may not have had: bytes of it in one phase.
TAKEN: dict[str, Callable[[Iteration, Phase], float]] = {
    "trajectories": lambda it, phase: phase.budget.get("trajectories", 0),
    "states": lambda it, phase: phase.budget.get("optimizer", 0) + phase.budget.get("master weights", 0),
    "gradients": lambda it, phase: phase.budget.get("gradients", 0),
    "vae": lambda it, phase: it.decode.weights if it.decode else 0,
    "denoiser": lambda it, phase: phase.budget.get("parameters", 0),
    "lora": lambda it, phase: weights_of(it.replay).trainable_bytes,
}


@lru_cache(maxsize=4)
def _iteration(settings: Settings) -> Iteration:
    return Iteration(settings)


def phases(row: Published, it: Iteration) -> list[Phase]:
    """Those that the run went through."""
    found: list[Phase] = []
    for name in row.run:
        if name == "training":
            found += [*it.training(it.pick().blocks), it.step()]
        elif name == "replay":
            found += it.training(it.pick().blocks)
        elif (phase := getattr(it, name)()) is not None:
            found.append(phase)
    return found


@dataclass(frozen=True)
class Answer:
    """What the planner says of a row: exact, with the margins that its kind has, and with what was there besides."""

    exact: float
    margins: float
    besides: float

    @property
    def whole(self) -> float:
        """With margins and with what no setting says."""
        return self.exact + self.margins + self.besides


def answer(row: Published) -> Answer:
    """GiB, or seconds in part E."""
    it = _iteration(row.asked())
    found = phases(row, it)
    if row.part == "E":
        return Answer(sum(phase.seconds for phase in found), 0.0, 0.0)
    extra = sum(EXTRAS[name].bytes(it) for name in row.besides)
    kind = row.taken or row.kind
    exact = max(phase.bytes - sum(TAKEN[name](it, phase) for name in row.without) for phase in found)
    if row.part == "B" and kind == "reserved" and it.decode is not None:
        # What the allocator holds of a decode follows from the sizes and lives of its tensors.
        exact += it.decode.reserved - sum(it.decode.peak.values())
    beside = margins(it.settings, exact) if row.part == "C" else {}
    size = sum(size for name, size in beside.items() if name not in KINDS[kind])
    return Answer(exact / GIB, size / GIB, extra / GIB)


def result(row: Published, where: Row) -> Row:
    """One line of the results; `off` is the answer over the measurement, less 1."""
    found: Row = {
        "op": "public",
        **{k: v for k, v in vars(row).items() if k != "not_planned"},
        "missing": row.missing() or None,
        "environment": where,
    }
    if found["missing"]:
        return found
    got = answer(row)
    plain = got.exact + got.margins
    return found | {
        "exact": round(got.exact, 4),
        "planned": round(plain, 4),
        "with_besides": round(got.whole, 4),
        "off": round(plain / row.measured - 1, 6),
        "off_with_besides": round(got.whole / row.measured - 1, 6),
    }


def results(where: Row, only: str = "") -> list[Row]:
    """Of every row whose words contain `only`; models one after the other, so that traces are found again."""
    chosen = [row for row in rows() if only in row.what]
    order = sorted(chosen, key=lambda row: (row.missing() != "", row.settings.get("model", "")))
    made = {}
    for row in order:
        made[id(row)] = result(row, where)
        one = made[id(row)]
        print(f"{row.part} {row.what}: {one['missing'] or _percent(one['off'])}", flush=True)
    return [made[id(row)] for row in chosen]


def within(row: Row, off: float) -> bool:
    """Whether so far off needs no cause."""
    if row["part"] == "E":
        return 1 / TIMES <= 1 + off <= TIMES
    exact = row["part"] == "A" and row["kind"] == "allocated"
    return abs(off) <= (ALLOCATED if exact else BOUNDS[row["part"]])


def unexplained(found: list[Row]) -> list[Row]:
    """Rows further off than their part's bound, or of memory further below than `LOW`, without a cause."""
    known = [row for row in found if row.get("off") is not None and not row["cause"]]
    return [row for row in known if not within(row, row["off"]) or (row["part"] != "E" and row["off"] < -LOW)]


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def summary(found: list[Row]) -> list[str]:
    """One line a part."""
    cells = []
    for part, title in PARTS.items():
        mine = [row for row in found if row["part"] == part]
        known = [row for row in mine if row.get("off") is not None]
        if not mine:
            continue
        line: list[Any] = [f"{part}. {title}", len(mine), len(mine) - len(known)]
        for key in ("off", "off_with_besides"):
            offs = [row[key] for row in known]
            line += [_percent(mean(offs)), f"{100 * median(map(abs, offs)):.1f} %"] if offs else ["", ""]
            line += [_percent(max(offs, key=abs))] if offs else [""]
        cells.append(line)
    head = ["", "rows", "not planned", "mean", "median size", "worst", "with causes: mean", "median size", "worst"]
    return grid(head, cells)


def _table(part: str, found: list[Row]) -> list[str]:
    unit = "s" if part == "E" else "GiB"
    cells = []
    for row in found:
        source = f"[source]({row['source']})"
        shown = f"{row['measured']:g}" + (f" {row['kind']}" if row["kind"] else "")
        shown += f", taken as {row['taken']}" if row["taken"] else ""
        if row["missing"]:
            cells.append([row["what"], shown, "", "", "", f"not planned: {row['missing']}", source])
            continue
        more = f"{row['with_besides']:.2f} ({_percent(row['off_with_besides'])})" if row["besides"] else ""
        cells.append([row["what"], shown, f"{row['planned']:.2f}", _percent(row["off"]), more, row["cause"], source])
    head = ["", f"measured, {unit}", "planned", "off", "with the cause", "cause, or why there is no plan", ""]
    return grid(head, cells)


def markdown(found: list[Row]) -> str:
    """All of it."""
    lines = [
        "# Memory: the planner beside what other people measured",
        "",
        "Made by `python -m bench.memory --only public` from `bench/memory/public_rows.jsonl`. What is `measured` was",
        "measured and published by others, on their GPUs; nothing here was run on a GPU. GiB = 2^30. allocated and",
        "reserved: as torch's allocator counts them; allocator: one of these, as the numbers of two cards differ by",
        "what cuBLAS takes from it, or as the page's other rows are; nvidia-smi: with the CUDA context.",
        "",
        "A plan is of the phases that a run went through, less what it did not have. Parts A and B are exact plans",
        "(reserved bytes of a decode follow from the sizes and lives of its tensors); C",
        "has those of the planner's margins that this way of reading memory has in it; E is counted work over assumed",
        "rates. `with the cause`: with what the run had that no setting of the planner says, by the rules below.",
        made_with(found[0]),
        "",
        *summary(found),
    ]
    for part, title in PARTS.items():
        mine = [row for row in found if row["part"] == part]
        if mine:
            lines += ["", f"## {part}. {title}", "", *_table(part, mine)]
    lines += ["", "## What runs had that no setting says", ""]
    used = {name for row in found for name in row["besides"]}
    lines += [f"- {name}: {extra.text}" for name, extra in EXTRAS.items() if name in used]
    return "\n".join(lines) + "\n"
