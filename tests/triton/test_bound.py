"""Launches that are kept by layouts: the second call hands Triton's compiled kernel what its own launcher would."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dancegrpo_fast.ops import _triton
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from . import offline


class Recorder(offline.Launcher):
    """Keeps what kernels are given."""

    launched: ClassVar[list[tuple[Any, ...]]] = []

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Packed metadata, metadata of the launch, and two hooks come before the kernel's own arguments.
        self.launched.append((self.name, x, y, z, *rest[4:]))


@pytest.fixture(autouse=True)
def no_device(tmp_path: Path) -> Iterator[None]:
    Recorder.launched.clear()
    with offline.launching(Recorder, tmp_path):
        yield


def described(value: Any, addresses: dict[int, str]) -> Any:
    """An argument; a tensor by its name, or its layout where it is new in each call."""
    if isinstance(value, tuple):
        return tuple(described(one, addresses) for one in value)
    if isinstance(value, Tensor):
        return addresses.get(value.data_ptr(), (value.dtype, tuple(value.shape), value.stride()))
    return value


def inputs() -> dict[str, Tensor]:
    made = {name: torch.zeros(2, 8, 64, dtype=torch.bfloat16) for name in "xyqk"}
    made |= {name: torch.zeros(2, 64, dtype=torch.bfloat16) for name in ("gate", "scale", "shift")}
    made |= {name: torch.zeros(32, dtype=torch.bfloat16) for name in ("q_weight", "k_weight")}
    return made | {name: torch.zeros(8, 16) for name in ("cos", "sin")}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 32))


CALLS: dict[str, Callable[..., Any]] = {
    "norm": lambda t, **how: norm_modulate(t["x"], t["scale"], t["shift"], **how),
    "rms": lambda t, **how: norm_modulate(t["x"], norm="rms", **how),
    "gated norm": lambda t, **how: gated_residual_norm_modulate(
        t["x"], t["y"], t["gate"], t["scale"], t["shift"], **how
    ),
    "gated": lambda t, **how: gated_residual(t["x"], t["y"], t["gate"], **how),
    "gelu": lambda t, **how: gelu_tanh(t["x"], **how),
    "gelu behind a prefix": lambda t, **how: gelu_tanh(t["x"], prefix=t["y"], **how),
    "queries and keys": lambda t, **how: qk_norm_rope(
        Stream(heads(t["q"]), heads(t["k"]), t["q_weight"], t["k_weight"], t["cos"], t["sin"]), **how
    ),
    "two streams": lambda t, **how: qk_norm_rope(
        Stream(heads(t["q"]), heads(t["k"]), t["q_weight"], t["k_weight"]), Stream(heads(t["x"]), heads(t["y"])), **how
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_kept_launch_is_given_what_the_launcher_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, seen = CALLS[name], []
    for number in range(3):
        tensors = inputs()
        call(tensors, mode="fast", backend="triton")
        addresses = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        seen.append([described(one, addresses) for one in Recorder.launched])
        Recorder.launched.clear()
        if number == 0:
            monkeypatch.setattr(_triton, "launch", lambda *arguments: pytest.fail("Triton's launcher was asked again"))
    assert seen[0] and seen[0] == seen[1] == seen[2]


def launches_by_triton(calls: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call asked Triton's launcher."""
    asked, original = [0], _triton.launch

    def counted(*arguments: Any) -> Any:
        asked[0] += 1
        return original(*arguments)

    monkeypatch.setattr(_triton, "launch", counted)
    found = []
    for call in calls:
        asked[0] = 0
        call()
        found.append(asked[0] > 0)
    return found


def test_other_layouts_are_other_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, how = torch.zeros(1, 8, 64), {"mode": "fast", "backend": "triton"}
    shifted = torch.zeros(8 * 64 + 1)[1:].view(1, 8, 64)
    longer = torch.zeros(1, 9, 64)
    strided = torch.zeros(1, 8, 128)[..., :64]
    calls = [lambda x=x: norm_modulate(x, **how) for x in (x, x, shifted, longer, strided, x.bfloat16(), shifted)]
    calls.append(lambda: norm_modulate(x, eps=1e-5, **how))
    assert launches_by_triton(calls, monkeypatch) == [True, False, True, True, True, True, False, True]


def test_tensors_at_one_place_and_copies_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x, how = torch.zeros(1, 8, 64), {"mode": "fast", "backend": "triton"}
    gate = torch.zeros(1, 64)
    twice = lambda: gated_residual(x, x, gate, **how)  # noqa: E731
    # Heads that are no whole runs of numbers are copied first.
    copied = lambda: qk_norm_rope(Stream(*(torch.zeros(1, 8, 2, 40)[..., :36] for _ in range(2))), **how)  # noqa: E731
    assert launches_by_triton([twice, twice, copied, copied], monkeypatch) == [True] * 4


def strides(call: Callable[[], Any]) -> list[Any]:
    """The batch strides and alignments of what each launch writes its queries to."""
    Recorder.launched.clear()
    call()
    return [(queries[7:9], queries[6].data_ptr() % 16) for _, _, _, _, queries, *_ in Recorder.launched]


def test_what_another_stream_changes_of_the_outputs_is_another_launch() -> None:
    """A joint buffer's strides, and where the second stream begins in it, follow from both streams."""

    def stream(*shape: int) -> Stream:
        return Stream(*(torch.zeros(2, *shape, dtype=torch.bfloat16) for _ in range(2)))

    def joint(*tokens: int, heads: tuple[int, int] = (2, 32)) -> list[Any]:
        return strides(lambda: qk_norm_rope(*(stream(n, *heads) for n in tokens), mode="fast", backend="triton"))

    for lengths in ((8, 16), (8, 48), (8, 16), (20,), (20, 16)):
        batch = 2 * 32 * sum(lengths)
        assert [found for found, _ in joint(*lengths)] == [(batch, 64)] * len(lengths)
    odd = [joint(text, 16, heads=(1, 12))[1] for text in (8, 7, 8, 7)]
    assert [place for _, place in odd] == [0, 8, 0, 8] and odd[0] == odd[2] != odd[1] == odd[3]
