"""Makes Triton's interpreter fast enough to test with."""

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from dancegrpo_fast import backends
from dancegrpo_fast.ops import selfcheck


@pytest.fixture(autouse=True)
def kernels_are_trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test compares what the kernels give: a self check would compute it once more, and eagerly where it is wrong."""
    if backends.interpreting() and "nothing_known" not in request.fixturenames:
        monkeypatch.setattr(selfcheck, "_first_call", lambda *_: True)


@pytest.fixture(autouse=True, scope="session")
def language_patched_once() -> Iterator[None]:
    """The interpreter patches the language again for every call of a device function, half of all its time."""
    if not backends.interpreting():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()
    restored = SimpleNamespace(restore=lambda: None)

    @cache
    def patch_once(fn: Callable[..., Any]) -> SimpleNamespace:
        seen = [id(value) for value in fn.__globals__.values()]
        modules = tuple(module for module in (tl, tl.core) if id(module) in seen)
        if modules not in done:
            done.add(modules)
            original(fn)
            # Triton before 3.7 has a conversion here that NumPy refuses from 2.4 on.
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return restored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        # A dictionary of all dtypes for every operator.
        numpys, of_scalars = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)
        patch.setattr(
            interpreter,
            "_get_np_dtype",
            lambda kind: numpys(kind) if isinstance(kind.scalar, tl.pointer_type) else of_scalars(kind.scalar),
        )
        yield
