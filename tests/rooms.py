"""The rooms of the package and who imports whom: `python -m tests.rooms`, in the root of the repository.

A room is a folder or a module right below `dancegrpo_fast`. An import counts wherever it stands, in a function too, but
not under `if TYPE_CHECKING`. A name of a module in a string, as `import_module` takes it, is a mention.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "dancegrpo_fast"
# From the bottom. A room imports from those of the lines above its own.
ORDER = (
    "kernels lazy install allocator progress stopping checks files marks rng drawing experts quantization shards",
    "transitions advantages prompts lora",
    "backends recipe",
    "ops optimizers",
    "patch",
    "activations dropin",
    "sequence",
    "attention processes compat compiling",
    "memory rewards",
    "run",
    "models",
    "plugins",
    "train",
    "evaluate profile demo",
    PACKAGE,
    "info",
    "cli",
)
Edge = tuple[str, str]  # who imports, and what


@dataclass
class House:
    """The modules of a package, their imports, and what their strings name."""

    modules: dict[str, Path]
    imports: set[Edge] = field(default_factory=set)
    mentions: set[Edge] = field(default_factory=set)

    @property
    def rooms(self) -> list[str]:
        """Names of the rooms."""
        return sorted({room(module) for module in self.modules})

    @property
    def arrows(self) -> dict[Edge, list[Edge]]:
        """The imports between two rooms, for each pair of rooms that has any."""
        found = defaultdict(list)
        for edge in sorted(self.imports):
            if room(edge[0]) != room(edge[1]):
                found[room(edge[0]), room(edge[1])].append(edge)
        return dict(found)


def read(root: Path, package: str = PACKAGE) -> House:
    """Reads the source of the package that lies in `root`; nothing of it is run."""
    # `rglob` follows no links, as `kernels` is one.
    folders = [root / package, *(p for p in (root / package).iterdir() if p.is_symlink() and p.is_dir())]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    house = House({".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files})
    for module, path in house.modules.items():
        here = module if path.name == "__init__.py" else module.rpartition(".")[0]
        nodes = list(_nodes(ast.parse(path.read_text(encoding="utf-8"))))
        house.imports |= {(module, found) for node in nodes for found in _imported(node, here, house.modules)}
        texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        lazy = path.name == "__init__.py" or "import_module" in {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        house.mentions |= {(module, found) for text in texts for found in _named(text, here, house.modules, lazy)}
    house.imports = {edge for edge in house.imports if edge[0] != edge[1]}
    return house


def room(module: str) -> str:
    """The room that a module is in; the package itself is one."""
    return [*module.split("."), module][1]


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child)


def _imported(node: ast.AST, here: str, modules: Iterable[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
        start = ".".join([*above, *([node.module] if node.module else [])])
        names = [f"{start}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        # A name of a module's is an import of the module.
        yield from [found for found in (name, name.rpartition(".")[0]) if found in modules][:1]


def _named(text: str, here: str, modules: Iterable[str], lazy: bool) -> Iterator[str]:
    """The module that a string names: in full, "package.rewards.ocr:Ocr", or where `lazy` relative to `here`."""
    name = text.partition(":")[0]
    if name.startswith(".") and lazy:
        name = f"{here.rpartition('.')[0]}{name}"
    for found in (name, f"{here}.{name}" if lazy else ""):
        if found in modules and found != PACKAGE:
            yield found


def upward(edges: Iterable[Edge], order: Iterable[str] = ORDER) -> list[Edge]:
    """Those of the edges that go up or sideways between rooms, and those of rooms without a place."""
    level = {name: height for height, names in enumerate(order) for name in names.split()}
    unknown, top = -1, len(level)
    return sorted(
        (start, end)
        for start, end in edges
        if room(start) != room(end) and level.get(room(start), unknown) <= level.get(room(end), top)
    )


def circles(edges: Iterable[Edge]) -> list[list[str]]:
    """Groups of what reaches each other along the edges."""
    follow = defaultdict(set)
    for start, end in edges:
        follow[start].add(end)
    reach = {}
    for node in follow:
        found, waiting = set(), [node]
        while waiting:
            new = follow.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        reach[node] = found
    groups = {frozenset(other for other in found if node in reach.get(other, ())) for node, found in reach.items()}
    return sorted(sorted(group) for group in groups if group)


def main() -> int:
    """Prints the rooms with what each imports, then what is wrong."""
    house = read(Path(__file__).parents[1])
    below = defaultdict(list)
    for start, end in house.arrows:
        below[start].append(end)
    for height, names in enumerate(ORDER):
        for name in names.split():
            texts = [path.read_text(encoding="utf-8") for module, path in house.modules.items() if room(module) == name]
            lines = sum(len(text.splitlines()) for text in texts)
            print(f"{height:2}  {name:14} {lines:5} lines  {' '.join(sorted(below[name]))}")
    wrong = {
        "upward imports": upward(house.imports),
        "circles of rooms": circles(house.arrows),
        "circles of modules": circles(house.imports),
    }
    print(f"{len(house.rooms)} rooms, {len(house.arrows)} arrows between them")
    for what, found in wrong.items():
        print(f"{what}: {len(found)}")
        for each in found:
            print("  " + " -> ".join(each))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
