"""Launches that are kept by layouts: the second call hands Triton's compiled kernel what its own launcher would."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dancegrpo_fast import policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.kernels.gelu_tanh import triton_kernels as gelu_kernels
from dancegrpo_fast.ops import _launch
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_linear import gelu_linear
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope
from dancegrpo_fast.transitions import dance_sde, shifted_sigmas

from ..release import release_but
from . import offline


class Recorder(offline.Launcher):
    """Keeps what kernels are given."""

    launched: ClassVar[list[tuple[Any, ...]]] = []

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Packed metadata, metadata of the launch, and two hooks come before the kernel's own arguments.
        self.launched.append((self.name, x, y, z, *rest[4:]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one test compiles others find."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def no_device(cache: Path) -> Iterator[None]:
    Recorder.launched.clear()
    with offline.launching(Recorder, cache):
        yield


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def described(launches: list[tuple[Any, ...]], like: list[Any], tensors: dict[str, Tensor]) -> list[Any]:
    """What kernels are given; where `like` has a tensor, whose memory it is and where in it, whichever that is."""
    given = list(leaves(tuple(launches)))
    names: dict[int, Any] = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in given if torch.is_tensor(one)}
    found = []
    for value, first in zip(given, like, strict=True):
        if not isinstance(first, Tensor):
            found.append(value)
            continue
        address = value.data_ptr() if isinstance(value, Tensor) else value
        start = next(start for start, size in sizes.items() if start <= address < start + max(size, 1))
        found.append((names.setdefault(start, len(names)), address - start))
    return found


def inputs() -> dict[str, Tensor]:
    made = {name: torch.zeros(2, 8, 64, dtype=torch.bfloat16) for name in "xyqk"}
    made |= {name: torch.zeros(2, 64, dtype=torch.bfloat16) for name in ("gate", "scale", "shift")}
    made |= {name: torch.zeros(32, dtype=torch.bfloat16) for name in ("q_weight", "k_weight")}
    made |= {name: torch.zeros(64, dtype=torch.bfloat16) for name in ("weight", "bias")}
    made |= {"rows": torch.zeros(2, 2, 64, dtype=torch.bfloat16), "matrix": torch.zeros(64, 64, dtype=torch.bfloat16)}
    return made | {name: torch.zeros(8, 16) for name in ("cos", "sin")}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 32))


CALLS: dict[str, Callable[..., Any]] = {
    "gelu before a linear layer": lambda t, **how: gelu_linear(
        t["x"], t["matrix"], t["bias"], h_bias=t["weight"], **how
    ),
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
    "norm of several consumers": lambda t, **how: norm_modulate_fanout(
        t["x"], t["scale"], t["shift"], consumers=3, **how
    ),
    "norm with parameters": lambda t, **how: norm_modulate(t["x"], weight=t["weight"], bias=t["bias"], **how),
    "gated, split": lambda t, **how: gated_residual(t["x"], t["y"], t["rows"], split=3, **how),
}


def differentiated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward, and gradients by all inputs."""

    def call(t: dict[str, Tensor], **how: Any) -> None:
        trained = {name: one if name in ("cos", "sin") else one.detach().requires_grad_() for name, one in t.items()}
        found = forward(trained, **how)
        outputs = [one for one in (found if isinstance(found, tuple) else (found,)) if one is not None]
        grads = [torch.empty_like(one) for one in outputs]
        torch.autograd.grad(outputs, [one for one in trained.values() if one.requires_grad], grads, allow_unused=True)

    return call


EVERY_RUN = {
    *("gelu before a linear layer", "gelu", "gated norm", "gated, split", "norm of several consumers"),
    *("queries and keys", "two streams", "step, seeds", "log_prob", "loss with a KL"),
}


@pytest.mark.parametrize("name", release_but(EVERY_RUN, CALLS))
def test_a_kept_launch_is_given_what_the_launcher_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kept(
        lambda tensors, number: differentiated(CALLS[name])(tensors, mode="fast", backend="triton"), inputs, monkeypatch
    )


def assert_kept(
    call: Callable[[dict[str, Tensor], int], Any], make: Callable[[], dict[str, Tensor]], patch: pytest.MonkeyPatch
) -> None:
    """The second call asks no launcher of Triton's, and gives kernels what it would."""
    seen: list[tuple[Any, ...]] = []
    for number in (0, 1, 1):
        tensors = make()
        with patch.context() as patched:
            if len(seen) == 1:
                patched.setattr(_launch, "launch", lambda *arguments: pytest.fail("Triton's launcher was asked again"))
            call(tensors, number)
        seen.append((list(Recorder.launched), tensors))
        Recorder.launched.clear()
        if len(seen) == 2:
            _launch._bound.clear()
    (_, _), kept, wanted = seen
    like = list(leaves(tuple(wanted[0])))
    assert like and described(kept[0], like, kept[1]) == described(wanted[0], like, wanted[1])


TABLE = dance_sde(shifted_sigmas(8, 3.0), 0.3)
POLICY: dict[str, Callable[[dict[str, Tensor], int], Any]] = {
    "step, given noise": lambda t, number: transition_step(
        t["x"], t["v"], TABLE, number + 1, noise=t["y"], backend="triton"
    ),
    "step, seeds": lambda t, number: transition_step(
        t["x"], t["v"], TABLE, number + 1, seed=3 + number * 2**40, backend="triton"
    ),
    "log_prob": lambda t, number: torch.autograd.grad(
        transition_log_prob(
            t["x"], t["v"].requires_grad_(), t["y"], TABLE, number, uncond_output=t["u"].requires_grad_(),
            guidance_scale=4.5, backend="triton",
        ),
        (t["v"], t["u"]),
        t["old"],
    ),
    "loss": lambda t, number: policy_loss(
        t["x"], t["v"].requires_grad_(), t["y"], TABLE, number, t["old"], t["advantages"], backend="triton"
    ).loss.backward(),
    "loss with a KL": lambda t, number: policy_loss(
        t["x"], t["v"].requires_grad_(), t["y"], TABLE, number, t["old"], t["advantages"], backend="triton",
        reference_output=t["u"], kl_weight=0.1,
    ).loss.backward(),
}  # fmt: skip


@pytest.mark.parametrize("name", release_but(EVERY_RUN, POLICY))
def test_so_are_those_of_the_policy_at_any_step_and_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> dict[str, Tensor]:
        return {name: torch.zeros(2, 5, 7) for name in "xyvu"} | {
            name: torch.zeros(2) for name in ("old", "advantages")
        }

    assert_kept(POLICY[name], make, monkeypatch)


def launches_by_triton(calls: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call asked Triton's launcher."""
    asked, original = [0], _launch.launch

    def counted(*arguments: Any) -> Any:
        asked[0] += 1
        return original(*arguments)

    monkeypatch.setattr(_launch, "launch", counted)
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


def test_tensors_at_one_place_are_another_launch_and_copies_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, how = torch.zeros(1, 8, 64), torch.zeros(1, 8, 64), {"mode": "fast", "backend": "triton"}
    gate = torch.zeros(1, 64)
    apart = lambda: gated_residual(x, y, gate, **how)  # noqa: E731
    twice = lambda: gated_residual(x, x, gate, **how)  # noqa: E731
    # Heads that are no whole runs of numbers are copied first.
    copied = lambda: qk_norm_rope(Stream(*(torch.zeros(1, 8, 2, 40)[..., :36] for _ in range(2))), **how)  # noqa: E731
    calls = [twice, twice, apart, apart, twice, copied, copied]
    assert launches_by_triton(calls, monkeypatch) == [True, False, True, False, False, True, True]


def test_what_computes_beside_its_launches_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(x: Tensor, *more: Callable[[Tensor], Any]) -> None:
        room = torch.empty(x.shape, device=x.device)
        for each in more:
            each(room)
        rows = x.view(1, -1)
        arguments = (rows, *rows.stride(), x.numel(), None, 0, 0, 0, room, x.numel(), 1, 0)
        _launch.launch_on(
            x.device, gelu_kernels.forward_kernel, 1, arguments, {"ptx": True, "block": 64, "num_warps": 1}
        )

    plain, x = _launch.planned(launched), torch.zeros(64)
    calls = [lambda: plain(x), lambda: plain(x)]
    calls += [
        lambda each=each: plain(x, each) for each in (Tensor.zero_, Tensor.clone, Tensor.detach) for _ in range(2)
    ]
    assert launches_by_triton(calls, monkeypatch) == [True, False, True, True, True, True, True, False]


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
