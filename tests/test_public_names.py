"""What `import dancegrpo_fast as dgf` shows, and that all of it is there."""

import pkgutil
from types import ModuleType

import pytest

import dancegrpo_fast as dgf
from dancegrpo_fast import compat, memory, train

# Modules of the package that are nobody's business, or commands.
INNER = {
    "allocator",
    "checks",
    "cli",
    "compiling",
    "drawing",
    "experts",
    "files",
    "info",
    "install",
    "kernels",
    "lazy",
    "optimizers",
    "progress",
    "recipes",
    "shards",
}


def test_every_public_module_is_shown() -> None:
    found = {module.name for module in pkgutil.iter_modules(dgf.__path__) if not module.name.startswith("_")}
    shown = {name for name in dir(dgf) if isinstance(getattr(dgf, name), ModuleType)}
    assert shown == found - INNER


@pytest.mark.parametrize("module", [dgf, compat, memory, train], ids=lambda module: module.__name__)
def test_what_is_shown_loads(module: ModuleType) -> None:
    assert dir(module) == sorted(module.__all__) and len(dir(module)) > 0
    for name in dir(module):
        assert getattr(module, name) is not None
    absent = "nothing"
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute '{absent}'"):
        getattr(module, absent)
