"""Block ops in "lossless" mode against eager torch: the first call of each signature on a device looks.

A slice of its arguments goes through Triton's kernels and through the reference. Equal bits are wanted where an op has
no sum of its own, else twice eager's own error against float64 (`_budget.py`). What differs is reported once; with
backend "checked" the reference computes this signature from then on, and the verdict never changes: what a backward
computes again, and a replay, must be what the rollout was.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._budget import budget

# What a slice has at most: samples, tokens spread over a sample, and numbers of one operand.
SAMPLES, TOKENS, ELEMENTS = 2, 64, 1 << 18

Arguments = tuple[Any, ...]
Outputs = Sequence[Tensor | None]
Signature = tuple[Any, ...]


class Check(NamedTuple):
    """One comparison.

    op, direction: of what; "forward" or "backward".
    device, signature: where, and dtypes, widths and operands that are present.
    equal: whether all bits were.
    max_abs_difference: from eager torch.
    budget: the distance from the truth that was allowed where the difference was largest; None: equal bits were wanted.
    passed: the verdict.
    """

    op: str
    direction: str
    device: str
    signature: str
    equal: bool
    max_abs_difference: float
    budget: float | None
    passed: bool


class Subject(NamedTuple):
    """One direction of an op, as functions of its registered arguments without the backend.

    kernel: given the module that launches it, and the arguments.
    reference: given the arguments.
    sliced: the arguments of a bounded part of the call.
    exact: of each output, whether its bits must be equal; None where it is not looked at.
    """

    op: str
    direction: str
    kernel: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    sliced: Callable[..., Arguments]
    exact: Callable[..., Sequence[bool | None]]


_records: list[Check] = []
_passed: dict[tuple[Any, ...], bool] = {}
_chosen: dict[str, bool] = {}
_trusted: dict[tuple[Any, ...], bool] = {}


def records() -> list[Check]:
    """What was compared in this process so far."""
    return list(_records)


def clear() -> None:
    """Forgets all comparisons and verdicts, those that other processes agreed on excepted."""
    for kept in (_records, _passed, _chosen, _trusted):
        kept.clear()


def kind(value: Tensor | None) -> torch.dtype | None:
    """An operand in a signature."""
    return None if value is None else value.dtype


def parameter_kind(value: Tensor | None, split: int) -> tuple[Any, ...]:
    """A `[B, rows, C]` parameter in a signature: its dtype, and what has a row of its own."""
    return (
        () if value is None else (value.dtype, "segment" if split >= 0 else "token" if value.shape[1] > 1 else "sample")
    )


class Slice:
    """Views of a call's first samples and some tokens that are spread evenly over them.

    Args:
        tokens, width: of `[B, tokens, width]`.
        split: the call's; that of the slice is `split`.
    """

    def __init__(self, tokens: int, width: int, split: int = -1):
        self.step = -(-tokens // max(1, min(TOKENS, ELEMENTS // width)))
        self.split = -(-split // self.step) if split > 0 else split

    def tokens(self, value: Tensor | None) -> Tensor | None:
        """Of `[B, S, ...]`."""
        return None if value is None else value[:SAMPLES, :: self.step]

    def parameter(self, value: Tensor | None) -> Tensor | None:
        """Of `[B, rows, C]`, with a row for each token, segment or sample."""
        return self.tokens(value) if parameter_kind(value, self.split)[1:] == ("token",) else _first(value)


def _first(value: Tensor | None) -> Tensor | None:
    return None if value is None else value[:SAMPLES]


def trusted(subject: Subject, triton: Any, signature: Signature, device: torch.device, *arguments: Any) -> bool:
    """Whether Triton's kernels compute this call; `arguments` are the op's, the backend last.

    A signature has nothing that ranks or micro-batches differ in: no numbers of samples or tokens, no strides.
    """
    key = (subject.op, subject.direction, signature, device, arguments[-1])
    known = _trusted.get(key)
    return _first_call(subject, triton, key, arguments[:-1]) if known is None else known


def _first_call(subject: Subject, triton: Any, key: tuple[Any, ...], arguments: Arguments) -> bool:
    *place, backend = key
    signature, device = place[2:]
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        # Neither can wait for a result: a later call looks.
        return True
    where = tuple(place)
    if where not in _passed:
        check = _compared(subject, triton, where, arguments, backend)
        if check is None:
            return True
        _records.append(check)
        _passed[where] = check.passed
    trust = True
    if backend == "checked":
        trust = _agreed(f"{subject.op} {subject.direction} of {_text(signature)}", _passed[where])
    _trusted[key] = trust
    return trust


def _agreed(name: str, passed: bool) -> bool:
    """The verdict of whoever looked first: another device of this process, or another rank.

    Ranks meet signatures in different orders: they ask the store of the process group, which no one has to wait for.
    """
    if name not in _chosen:
        _chosen[name] = passed
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and dist.get_backend() != "fake":
            store = dist.distributed_c10d._get_default_store()
            _chosen[name] = store.compare_set(f"dancegrpo_fast: {name}", "", str(passed)) == b"True"
    if _chosen[name] != passed:
        found, used = ("passed", "eager torch") if passed else ("failed", "Triton")
        warnings.warn(
            f"{name}: the self check {found} here, but not where it came first; {used} computes it everywhere",
            RuntimeWarning,
            stacklevel=2,
        )
    return _chosen[name]


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    return str(value).removeprefix("torch.")


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Where nothing of the caller's sees what is computed, or changes it."""
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.autocast(device.type, enabled=False),
        # A checkpoint counts what is saved, and a backward of the reference saves.
        torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept),
    ):
        yield


def _in_double(value: Any) -> Any:
    """An argument for the truth: float64, and rounded nowhere."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, list):
        return [_in_double(each) for each in value]
    if isinstance(value, torch.dtype):
        return None
    return "fast" if isinstance(value, str) and value == "lossless" else value


class _Verdict(NamedTuple):
    """Of one output: the verdict, what differs from eager torch, by how much at most, and what was allowed there."""

    passed: bool
    difference: float
    budget: float | None
    differing: int
    elements: int


def _judged(ours: Tensor, eager: Tensor, truth: Tensor, exact: bool) -> _Verdict:
    apart = (ours != eager) & ~(ours.isnan() & eager.isnan())
    off = torch.where(apart, (ours.double() - eager.double()).abs(), 0.0).nan_to_num(nan=math.inf)
    allowed = None if exact else budget(truth, eager)
    failed = apart
    if allowed is not None:
        # Where eager torch has no number there is nothing to compare with.
        within = (ours.double() - truth).abs() <= allowed
        failed = truth.isfinite() & eager.isfinite() & ~within
    # The host waits here, once for each signature: a verdict that it did not know could not choose what runs.
    passed = not bool(failed.any())
    place = int((off if passed else torch.where(failed, off, -1.0)).argmax())
    there = None if allowed is None else float(allowed.flatten()[place])
    return _Verdict(passed, float(off.flatten()[place]), there, int(apart.sum()), apart.numel())


def _compared(
    subject: Subject, triton: Any, place: tuple[Any, ...], arguments: Arguments, backend: str
) -> Check | None:
    """One comparison, and a warning where it failed; None where all that is to be seen is 0."""
    _, _, signature, device = place
    with _apart(device):
        part = subject.sliced(*arguments)
        found, plain = subject.kernel(triton, *part), subject.reference(*part)
        truth = subject.reference(*map(_in_double, part))
        looked = [
            (ours, eager, value, exact)
            for ours, eager, value, exact in zip(found, plain, truth, subject.exact(*part), strict=False)
            if exact is not None and ours is not None and eager is not None and value is not None and ours.numel()
        ]
        verdicts = [_judged(*each) for each in looked]
        # Gradients of advantages that are 0, say: a later call has more to show.
        blank = not any(bool(t.any()) for ours, eager, _, _ in looked for t in (ours, eager))
    if blank:
        return None
    worst = min(verdicts, key=lambda verdict: (verdict.passed, -verdict.difference, verdict.budget is None))
    check = Check(
        subject.op,
        subject.direction,
        str(device),
        _text(signature),
        not any(verdict.differing for verdict in verdicts),
        worst.difference,
        worst.budget,
        worst.passed,
    )
    if not check.passed:
        wanted = "equal bits" if worst.budget is None else f"within {worst.budget:.3g} of the truth"
        then = "eager torch computes it from now on" if backend == "checked" else 'on_mismatch="eager" avoids it'
        warnings.warn(
            f"{subject.op} {subject.direction} on {device}, {check.signature}: differs from eager torch by up to"
            f" {worst.difference:.3g} in {worst.differing} of {worst.elements} elements looked at, want {wanted};"
            f" {then}",
            RuntimeWarning,
            stacklevel=2,
        )
    return check
