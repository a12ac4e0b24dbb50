"""Public names that load on first use: what a package's `__getattr__` and `__dir__` are made of."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, homes: Mapping[str, Sequence[str]], modules: Mapping[str, str] | Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: its `__name__`.
        homes: its public names, by the module that defines them; modules are named relative to the package.
        modules: its public modules; where one lies elsewhere, its public name and the module.
    """
    names = {name: home for home, defined in homes.items() for name in defined}
    places = dict(modules) if isinstance(modules, Mapping) else {name: name for name in modules}
    public = sorted([*names, *places])

    def load(name: str) -> Any:
        if name in names:
            value = getattr(importlib.import_module(f".{names[name]}", package), name)
        elif name in places:
            value = importlib.import_module(f".{places[name]}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return load, public.copy, public
