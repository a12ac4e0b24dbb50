"""What an audit's numbers mean, in words. Needs no torch."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """One sample of a call: fingerprints of its latents, of the next ones and of the model's output, and its score."""

    start: int
    after: int
    output: int
    score: float
    rounded: dict[str, int]
    how: dict[str, str]


def judge(drawn: Sequence[Pair], replayed: Sequence[Pair], between: Counter[str], forgotten: int) -> dict[str, Any]:
    """Looks up what was replayed in what was drawn.

    Args:
        drawn: samples of rollout calls; the next latents with their roundings.
        replayed: samples of replay calls before the first update.
        between: how many rollout calls start from the "same" latents that the one before returned, from "near" ones,
            or from them in another dtype, by its name.
        forgotten: rollout calls that are not among `drawn`.

    Returns:
        `pairs`, of which the ratio could be taken; `largest`, the largest abs(ratio - 1), None without pairs;
        `never_drawn`; `findings`, what is wrong and what to change; `text`, one line.
    """
    exact = {(pair.start, pair.after): pair for pair in drawn}
    after = {pair.after: pair for pair in drawn}
    rounded = {(name, value): pair for pair in drawn for name, value in pair.rounded.items()}
    dtypes = {name for name, _ in rounded}
    kinds: Counter[str] = Counter()
    offs: dict[str, float] = {}
    reasons: Counter[str] = Counter()
    outputs = 0
    for pair in replayed:
        found, kind = exact.get((pair.start, pair.after)), "exact"
        for name in dtypes if found is None else ():
            found, kind = rounded.get((name, pair.after)), name
            if found is not None:
                break
        if found is None:
            found, kind = after.get(pair.after), "start"
        if found is None:
            kinds["never"] += 1
            continue
        kinds[kind] += 1
        if found.score != found.score:
            continue  # it was not scored when it was drawn
        off = abs(math.expm1(min(pair.score - found.score, 700.0)))
        offs[kind] = max(offs.get(kind, 0.0), off if off == off else math.inf)
        if kind == "exact" and off != 0:
            reasons.update(_changes(found.how, pair.how))
            outputs += pair.output == found.output
    largest = max(offs.values(), default=None)
    findings = [*_between(between), *_replays(kinds, offs, len(replayed), forgotten)]
    if offs.get("exact"):
        findings.append(_ratio(offs["exact"], reasons, outputs))
    matched = sum(kinds.values()) - kinds["never"]
    text = "no score to compare" if largest is None else f"largest abs(ratio - 1) {largest:.2g}"
    return {
        "pairs": matched,
        "largest": largest,
        "never_drawn": kinds["never"],
        "findings": findings,
        "text": f"first update: {text}, {matched} of {len(replayed)} replayed samples were drawn",
    }


def _between(between: Counter[str]) -> list[str]:
    total, found = sum(between.values()), []
    for name, count in between.items():
        if name == "near" and count:
            found.append(
                f"{count} of {total} rollout calls start from other latents than the call before returned: what the"
                " script changes between its steps is not in its log-probabilities"
            )
        elif name != "same" and count:
            found.append(
                f"{count} of {total} rollout calls start from the {name} rounding of what the call before returned:"
                f" --latents {name} rounds them before they are scored"
            )
    return found


def _replays(kinds: Counter[str], offs: dict[str, float], total: int, forgotten: int) -> list[str]:
    found = []
    for kind, count in kinds.items():
        if kind == "exact":
            continue
        off = f"abs(ratio - 1) up to {offs.get(kind, 0.0):.2g}"
        if kind == "never":
            why = "its latents or its next latents changed on the way, or come from somewhere else"
            if forgotten:
                why = f"the first {forgotten} rollout calls were forgotten, {why}"
            found.append(f"{count} of {total} replayed samples were never drawn: {why}")
        elif kind == "start":
            found.append(
                f"{count} of {total} replayed samples start from other latents than they were drawn from ({off}):"
                " keep the latents that the model saw"
            )
        else:
            found.append(
                f"{count} of {total} replayed samples have their next latents in {kind}, and were scored in more digits"
                f" when they were drawn ({off}): --latents {kind} scores them as stored"
            )
    return found


def _changes(rollout: dict[str, str], replay: dict[str, str]) -> list[str]:
    return [
        f"{name} {rollout[name]} in rollout and {replay[name]} in replay"
        for name in rollout
        if rollout[name] != replay[name]
    ]


def _ratio(largest: float, reasons: Counter[str], outputs: int) -> str:
    why = "; ".join(reasons)
    if outputs:
        why = why or "the model's output is the same, so the step was called with other settings"
    elif not why:
        why = "the model's output differs: dropout or train mode, other guidance, prompts, weights or kernels"
    return f"abs(ratio - 1) is up to {largest:.2g} where it should be 0: {why}"
