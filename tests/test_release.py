"""What `make test` leaves out of a test with many parameters."""

from itertools import combinations, product

from .release import meeting


def test_every_two_values_meet_in_a_few_cases() -> None:
    cases = [dict(zip("abcd", map(str, values), strict=True)) for values in product(range(2), range(3), range(2), "x")]

    def pairs(numbers: set[int]) -> set[object]:
        return {pair for number in numbers for pair in combinations(cases[number].items(), 2)}

    kept = meeting(cases)
    assert pairs(kept) == pairs(set(range(len(cases)))) and len(kept) == 6
