"""Where `out` may lie: anywhere that shares no element with an input, nor with itself; torch and numpy decide."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from dancegrpo_fast import transition_step
from dancegrpo_fast.ops import _overlap
from dancegrpo_fast.ops._overlap import overlap, overlaps_itself

from .cases import BACKENDS, F32, F64, TABLES, bits

TABLE = TABLES["flow"]


def array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()


def window(rng: random.Random, memory: Tensor, shape: tuple[int, ...], strides: tuple[int, ...] = ()) -> Tensor:
    """Any strides, zero among them, or the given ones, at any offset that fits."""
    while True:
        steps = strides or tuple(rng.choice((0, 1, 2, 3, 5, 7, 12, 36)) for _ in shape)
        extent = sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) + 1
        if extent <= len(memory):
            return memory.as_strided(shape, steps, rng.randrange(len(memory) - extent + 1))


def test_overlap_is_numpy_s() -> None:
    """Exactly, whatever the strides; numpy solves the same equations by a program of its own."""
    rng, seen = random.Random(0), set()
    for _ in range(3000):
        memory = torch.zeros(rng.choice((40, 150, 400)))
        shapes = [tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4))) for _ in range(2)]
        first = window(rng, memory, shapes[0])
        second = window(rng, rng.choice((memory, memory.view(torch.float64), memory.view(torch.int16))), shapes[1])
        if rng.random() < 0.3:
            # Strides in common, as the entries of a trajectory have them.
            second = window(rng, memory, shapes[0], first.stride())
        wanted = np.shares_memory(array(first), array(second))
        assert overlap(first, second) == overlap(second, first) == wanted
        seen.add((wanted, np.may_share_memory(array(first), array(second))))
    # Also views whose ranges meet and whose elements do not.
    assert seen == {(False, False), (False, True), (True, True)}


def test_self_overlap_is_that_of_the_indices() -> None:
    rng, found = random.Random(1), []
    memory = torch.arange(1000)
    for _ in range(3000):
        view = window(rng, memory, tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4))))
        found.append(len(view.unique()) < view.numel())
        assert overlaps_itself(view) == found[-1], (view.shape, view.stride())
    assert 500 < sum(found) < 2500


def test_a_long_search_ends_as_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    memory = torch.empty(400_000_000, dtype=torch.uint8)
    views = [memory.as_strided((2,) * 9, [rng.randrange(1, 40_000_000) for _ in range(9)], start) for start in (0, 1)]
    assert not overlap(*views)
    monkeypatch.setattr(_overlap, "_MOST_TRIES", 100)
    assert overlap(*views)


def step(latents: Tensor, output: Tensor, out: Tensor, backend: str):
    return transition_step(latents, output, TABLE, 1, seed=3, out=out, backend=backend)


def refused(memory: Tensor, place: str) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of which one shares an element with `out`, or `out` with itself."""
    apart = torch.zeros(3, 4, 5)
    out = memory[:60].view(3, 4, 5)
    inputs = {"latents": apart, "model_output": apart, "uncond_output": apart, "noise": apart}
    if place == "expanded":
        return inputs, torch.zeros(3, 4, 1).expand(3, 4, 5)
    if place == "windows":
        return inputs, torch.zeros(80).as_strided((3, 4, 5), (20, 4, 1))
    if place == "crossed":
        return inputs, torch.zeros(80).as_strided((3, 4, 5), (10, 2, 4))
    name, how = place.split()
    views = {
        "itself": out,
        "shifted": memory[1:61].view(3, 4, 5),
        "last": memory[59:119].view(3, 4, 5),
        "flipped": memory[:60].view(5, 4, 3).permute(2, 1, 0),
        "alias": torch.from_numpy(memory.numpy())[4:64].view(3, 4, 5),
        "bytes": memory.view(torch.bfloat16)[:60].view(3, 4, 5),
    }
    return inputs | {name: views[how]}, out


PLACES = ["expanded", "windows", "crossed"]
PLACES += [
    f"{name} {how}"
    for name in ("latents", "model_output", "uncond_output", "noise")
    for how in ("itself", "shifted", "last", "flipped", "alias", "bytes")
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_refused(place: str, backend: str) -> None:
    memory = torch.zeros(120)
    inputs, out = refused(memory, place)
    word = place.split()[0] if " " in place else "twice"
    with pytest.raises(ValueError, match=rf"^out: .*{word}"):
        transition_step(**inputs, table=TABLE, step=1, guidance_scale=2.0, out=out, backend=backend)
    assert not bool(memory.any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_beside_the_inputs_in_one_buffer(dtype: torch.dtype, backend: str) -> None:
    """Entries of a trajectory, interleaved elements and columns are memory of their own."""
    g = torch.Generator().manual_seed(0)
    buffers = torch.randn(4, 9, 6, 8, generator=g, dtype=dtype)
    for latents, output, out in (
        (buffers[:, 0], buffers[:, 1], buffers[:, 2]),
        (buffers[0::2], buffers[1::2], torch.empty(2, 9, 6, 8, dtype=dtype)),
        (buffers[..., 0::2], buffers[..., 1::4].repeat(1, 1, 1, 2), buffers[..., 1::2]),
        (buffers[:2, :, :3], buffers[2:, :, :3], buffers[:2, :, 3:]),
        (buffers[:2].mT, buffers[2:].mT, buffers.new_empty(2, 6, 8, 9).permute(0, 3, 2, 1)),
    ):
        wanted = transition_step(latents.clone(), output.clone(), TABLE, 1, seed=3, backend=backend)
        found = step(latents, output, out, backend)
        assert found.latents is out and bits(out) == bits(wanted.latents)
        assert bits(found.log_prob) == bits(wanted.log_prob)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_in_a_compiled_graph_too(backend: str) -> None:
    """No silent wrong sample there: refused, or the numbers of a call without overlap."""

    def run(buffer: Tensor) -> Tensor:
        with torch.no_grad():
            return step(buffer[:60].view(3, 4, 5), torch.ones(3, 4, 5), buffer[30:90].view(3, 4, 5), backend).log_prob

    torch._dynamo.reset()
    memory = torch.randn(120, generator=torch.Generator().manual_seed(0))
    wanted = transition_step(memory[:60].view(3, 4, 5), torch.ones(3, 4, 5), TABLE, 1, seed=3, backend=backend)
    try:
        log_prob = torch.compile(run, fullgraph=True, backend="aot_eager")(memory)
    except ValueError as error:
        assert str(error).startswith("out: ")
    else:
        assert torch.equal(log_prob, wanted.log_prob) and torch.equal(memory[30:90].view(3, 4, 5), wanted.latents)
