"""What only a release needs, and whoever touches that part: `make test-all`."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest


def release_but(stays: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values of one parameter, of which `make test` takes those in `stays` and leaves the others out."""
    return [one if one in stays else pytest.param(one, marks=pytest.mark.release) for one in values]


def meeting(cases: Sequence[dict[str, str]]) -> set[int]:
    """So few of the cases that every two values of two parameters, which meet in one of them, meet in one of these."""
    pairs = [set(combinations(sorted(case.items()), 2)) for case in cases]
    left, found = set().union(*pairs), set()
    while left:
        best = max(range(len(cases)), key=lambda case: len(pairs[case] & left))
        left -= pairs[best]
        found.add(best)
    return found


def mark_release(items: Iterable[pytest.Item]) -> None:
    """Of tests marked `pairs`, marks the cases that `meeting` does not need."""
    tests: dict[tuple[Any, str], list[Any]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairs") is not None:
            tests[item.path, item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        kept = meeting([{name: repr(value) for name, value in case.callspec.params.items()} for case in cases])
        for number, case in enumerate(cases):
            if number not in kept:
                case.add_marker(pytest.mark.release)
