"""The atlas: every known model at its usual sizes, on every size of card, as `docs/atlas.md` shows it.

A size of a model is one piece of work, in a process of its own: each of its settings is traced once and solved for all
cards. The file is written after each, so that a run that ends early is taken up again. A setting is planned again if
what it is made of changed: the planner's code and this file (comments aside), its models' configurations, torch,
diffusers and peft, the setting itself, what may leave the card, or the cards and their rates.
"""

import ast
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from dancegrpo_fast.files import write_text
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.budget import Plan
from dancegrpo_fast.memory.planning.cards import CARDS, MEANT
from dancegrpo_fast.memory.planning.planner import on_cards
from dancegrpo_fast.memory.planning.rewards import REWARD_MODELS
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.verdict import YES, Verdict, judged, shortened

from ..repository import RESULTS, ROOT
from ..rows import Row
from .usual import TRAINED, Away, Size, Trained, settings, sizes

FILE = RESULTS / "memory-atlas.json"
# What a plan is made by.
_CODE = ("memory/planning", "memory/trace", "activations", "attention", "patch", "quantization.py", "lora.py")
_PACKAGES = ("torch", "diffusers", "peft")


class Place(NamedTuple):
    """A size of a model."""

    model: str
    size: Size

    def __str__(self) -> str:
        return f"{self.model} {' x '.join(map(str, self.size))}"


class Entry(NamedTuple):
    """A row that is to be made."""

    place: Place
    trained: Trained
    cards: int

    @property
    def settings(self) -> Settings:
        """On no card yet, with nothing away."""
        return settings(*self.place, self.trained, self.cards)

    @property
    def made_of(self) -> str:
        """A fingerprint of all that the row follows from."""
        away = [other.changes for other in self.trained.away]
        cards = [[name, CARDS[name].gib, CARDS[name].device, vars(CARDS[name].rates)] for name in MEANT]
        text = json.dumps([planner(), self.settings.as_dict(), away, cards])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def planner() -> str:
    """A fingerprint of the code that plans and of this file, without comments, and of what they stand on."""
    found = hashlib.sha256()
    package = ROOT / "dancegrpo_fast"
    files = [path for name in _CODE for path in [package / name, *sorted((package / name).rglob("*"))]]
    files.append(Path(__file__))
    for path in files:
        if path.suffix == ".py":
            found.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
        elif path.suffix == ".json":
            found.update(path.read_bytes())
    found.update(" ".join(importlib.metadata.version(name) for name in _PACKAGES).encode())
    return found.hexdigest()


def entries() -> list[Entry]:
    """All of the atlas, in the order of the page."""
    places = [Place(model, size) for model in specs.names() for size in sizes(model)]
    return [Entry(place, trained, count) for place in places for trained in TRAINED for count in trained.counts]


def command(asked: Settings) -> str:
    """What `dancegrpo-fast memory` is asked for the same plan, but for the card."""
    return " ".join(["dancegrpo-fast memory", asked.model, *options(asked, Settings(asked.model))])


def options(asked: Settings, base: Settings) -> Iterator[str]:
    """Those that make one setting of another."""
    for field in fields(Settings):
        value = getattr(asked, field.name)
        if value == getattr(base, field.name):
            continue
        if field.name == "rewards":
            value = [next(name for name, of in REWARD_MODELS.items() if of == reward.name) for reward in value]
        given = ",".join(value) if isinstance(value, list | tuple) else str(value)
        yield f"--{field.name} {given.lower() if isinstance(value, bool) else given}"


class Answer(NamedTuple):
    """Of one card: its plan, the verdict, and which of `away` it is with."""

    plan: Plan
    verdict: Verdict
    away: int


def answers(asked: Settings, away: Sequence[Away], names: Iterable[str] = MEANT) -> dict[str, Answer]:
    """On each card the first of what may be away that fits, else the one with the most room."""
    found: dict[str, Answer] = {}
    left = list(names)
    for i, other in enumerate(away):
        for name, plan in on_cards(asked.changed(**other.changes), left).items():
            new = Answer(plan, judged(plan, CARDS[name].size, CARDS[name].gib), i)
            if name not in found or new.verdict.spare_bytes > found[name].verdict.spare_bytes:
                found[name] = new
        left = [name for name in left if found[name].verdict.state != YES]
    return found


def row(entry: Entry, where: Row) -> Row:
    """Plans one setting; `refused` says why there is no plan."""
    asked, away = entry.settings, entry.trained.away
    # Before the code on the disk may become another than what runs.
    made_of, begin = entry.made_of, time.process_time()
    frames, height, width = entry.place.size
    made: Row = {
        "model": entry.place.model,
        "frames": frames,
        "height": height,
        "width": width,
        "trained": entry.trained.words,
        "count": entry.cards,
        "command": command(asked),
        "away": [[other.words, " ".join(options(asked.changed(**other.changes), asked))] for other in away],
    }
    try:
        found = answers(asked, away)
        made["answers"] = {name: _short(answer) for name, answer in found.items()}
    except ValueError as error:
        made["refused"] = str(error)
    cpu = round(time.process_time() - begin, 1)
    return made | {"made_of": made_of, "cpu_seconds": cpu, "environment": where}


def _short(answer: Answer) -> list[Any]:
    """State, GiB to spare, seconds of an iteration, policy of checkpointing, which of `away`, phase of the peak."""
    verdict = answer.verdict
    # Downwards, so that what is missing stays below 0.
    spare = math.floor(100 * verdict.spare_bytes / GIB) / 100
    swapped = answer.plan.settings.blocks_to_swap
    policy = shortened(verdict.policy) + (f"; blocks_to_swap {swapped}" if swapped else "")
    return [verdict.state, spare, round(verdict.seconds, 1), policy, answer.away, answer.plan.peak.name]


def _rows(wanted: list[Entry], where: Row) -> list[Row]:
    """In a process of its own, which forgets its traces."""
    import torch

    torch.set_num_threads(1)
    return [row(entry, where) for entry in wanted]


def _identity(found: Row) -> tuple[Any, ...]:
    return tuple(found[key] for key in ("model", "frames", "height", "width", "trained", "count"))


def _of(entry: Entry) -> tuple[Any, ...]:
    return entry.place.model, *entry.place.size, entry.trained.words, entry.cards


def read(file: Path) -> list[Row]:
    """Rows that are there."""
    found: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return found


def write(file: Path, rows: Iterable[Row]) -> None:
    """All of them in one step, a row a line, and the cards that they are of."""
    cards = [
        {"name": name, "label": CARDS[name].label, "size": CARDS[name].size, "gib": CARDS[name].gib} for name in MEANT
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(each) for each in rows)
    write_text(file, f'{{"cards": {json.dumps(cards)},\n"rows": [\n{lines}\n]}}\n')


def make(file: Path, name: str, jobs: int, where: Row) -> None:
    """Plans what is not in the file yet, and says what is left.

    Args:
        file: written after each size of a model.
        name: only sizes whose name contains this, such as "flux-dev 1 x 512"; rows of others stay.
        jobs: processes at once, each of one thread.
        where: the environment.
    """
    where = {name: where[name] for name in (*_PACKAGES, "git", "date")}
    where["dancegrpo_fast"] = importlib.metadata.version("dancegrpo_fast")
    every = entries()
    known = {_identity(found): found for found in read(file)}
    fresh = {_of(entry) for entry in every if known.get(_of(entry), {}).get("made_of") == entry.made_of}
    work: dict[Place, list[Entry]] = {}
    for entry in every:
        if name in str(entry.place) and _of(entry) not in fresh:
            work.setdefault(entry.place, []).append(entry)
    places = len({entry.place for entry in every})
    print(f"{len(fresh)} of {len(every)} settings ({places} sizes of models) are made; {len(work)} sizes to plan now")
    print(left(known.values(), places, jobs, "the whole of it"), flush=True)
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(_rows, wanted, where): place for place, wanted in work.items()}
        for done, future in enumerate(as_completed(waiting), 1):
            try:
                made = future.result()
            except BaseException:
                # Else it is told when all others have ended.
                pool.shutdown(cancel_futures=True)
                raise
            known |= {_identity(found): found for found in made}
            write(file, [known[_of(entry)] for entry in every if _of(entry) in known])
            spent = sum(found["cpu_seconds"] for found in made)
            print(f"{waiting[future]}: {len(made)} settings, {spent:.0f} s of a core; {done} of {len(work)} sizes made")
            for refused in sorted({found["refused"] for found in made if "refused" in found}):
                print(f"  no plan: {refused}")
            print(left(known.values(), len(work) - done, jobs, "what is left"), flush=True)
    write(file, [known[_of(entry)] for entry in every if _of(entry) in known])


def left(known: Iterable[Row], places: int, jobs: int, what: str) -> str:
    """An estimate: as long as the sizes of models that are made took on average."""
    spent: dict[tuple[Any, ...], float] = {}
    for found in known:
        place = _identity(found)[:4]
        spent[place] = spent.get(place, 0.0) + found["cpu_seconds"]
    if not spent:
        return f"{what}: {places} sizes of models, and none is made yet to say how long"
    mean = sum(spent.values()) / len(spent)
    return (
        f"{what}: {places} sizes of models at {mean:.0f} s of a core, the mean of {len(spent)}: about"
        f" {places * mean / jobs / 60:.0f} min on {jobs} cores"
    )
