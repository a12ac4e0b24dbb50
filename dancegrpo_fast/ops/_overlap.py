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
    steps = sorted((stride, n - 1) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    reach = 0
    for stride, most in steps:
        if stride <= reach:
            break
        reach += stride * most
    else:
        return False
    # Two indices whose last difference, in this order, is in dimension k and positive.
    for k, (stride, most) in enumerate(steps):
        below = [(factor, 2 * n) for factor, n in steps[:k]]
        if _reaches(sum(f * n for f, n in steps[:k]) - stride, [*below, (stride, most - 1)]):
            return True
    return False


def storage_span(tensor: Tensor) -> tuple[int, int]:
    """First and last address, exclusive, of the memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether a byte belongs to both tensors."""
    size, width = first.element_size(), second.element_size()
    offset = second.data_ptr() - first.data_ptr()
    strides = first.stride()
    if strides == second.stride() and first.shape == second.shape and size == width and strides[0]:
        # Entries of one trajectory: how far apart, modulo the way from one sample to the next.
        sample = sum((n - 1) * stride for n, stride in zip(first.shape[1:], strides[1:], strict=True)) * size + size
        if sample <= offset % (strides[0] * size) <= strides[0] * size - sample:
            return False
    ours, theirs = _steps(first, size), _steps(second, width)
    last = offset + sum(factor * most for factor, most in theirs) + width - 1
    return _reaches(last, [*ours, *theirs, (1, size - 1), (1, width - 1)])
