"""Whether strided tensors share memory, exactly: an address is a sum of whole multiples of strides."""

import math

from torch import Tensor

# Strides that nobody chooses can make the search long: past it tensors count as sharing memory.
_MOST_TRIES = 20_000
_Terms = list[tuple[int, int]]


def _merged(terms: _Terms) -> _Terms:
    """Fewer terms of the same sums, by ascending factor: what steps evenly is one."""
    found: _Terms = []
    for factor, most in sorted(terms):
        if most == 0:
            continue
        if found:
            below, reach = found[-1]
            if factor % below == 0 and reach + 1 >= factor // below:
                found[-1] = below, reach + factor // below * most
                continue
        found.append((factor, most))
    return found


def _reaches(target: int, terms: _Terms) -> bool:
    """Whether `sum(factor x) = target` for some whole x from 0 to `most` of every `(factor, most)`."""
    terms = _merged(terms)
    sums, common, total = [0], [0], 0
    for factor, most in terms:
        total += factor * most
        sums.append(total)
        common.append(math.gcd(common[-1], factor))
    left = [(target, len(terms))]
    for _ in range(_MOST_TRIES):
        if not left:
            return False
        rest, count = left.pop()
        if rest == 0:
            return True
        if rest < 0 or rest > sums[count] or rest % common[count]:
            continue
        factor, most = terms[count - 1]
        first = max(0, -((sums[count - 1] - rest) // factor))
        last = min(most, rest // factor, first + _MOST_TRIES)
        left += [(rest - factor * x, count - 1) for x in range(first, last + 1)]
    return True


def _steps(tensor: Tensor, size: int = 1) -> _Terms:
    return [(stride * size, n - 1) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor lie at one address."""
    if tensor.is_contiguous():
        return False
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return True
    steps = sorted(step for step in _steps(tensor) if step[1])
    reach, nested = 0, True
    for stride, most in steps:
        nested = nested and stride > reach
        reach += stride * most
    if nested:
        return False
    # Two indices whose last difference, in this order, is in dimension k and positive.
    for k, (stride, most) in enumerate(steps):
        below = [(factor, 2 * n) for factor, n in steps[:k]]
        if _reaches(sum(f * n for f, n in steps[:k]) - stride, [*below, (stride, most - 1)]):
            return True
    return False


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether a byte belongs to both tensors."""
    one, other = first.untyped_storage(), second.untyped_storage()
    start, begin = one.data_ptr(), other.data_ptr()
    if start + one.nbytes() <= begin or begin + other.nbytes() <= start:
        return False
    size, width = first.element_size(), second.element_size()
    steps, strides = _steps(first, size), _steps(second, width)
    last = second.data_ptr() + sum(factor * most for factor, most in strides) + width - 1
    return _reaches(last - first.data_ptr(), [*steps, *strides, (1, size - 1), (1, width - 1)])
