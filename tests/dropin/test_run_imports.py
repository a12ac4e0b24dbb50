"""The shapes in which real repositories hold their step functions, each under `run` and under plain Python."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .test_run import RUN, SAID, python, write

SIGNATURE = "(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)"
STEP = f"def flux_step{SIGNATURE}:\n    return __name__\n"
METHOD = "class FlowMatchSDEDiscreteScheduler:\n    def sample_previous_step(self, sample):\n        return 1\n"
# As setuptools writes it beside an `.pth` file that installs it.
FINDER = """
import sys
from importlib.util import spec_from_file_location
from itertools import chain
from pathlib import Path

MAPPING = {"editable": "%s"}


class _EditableFinder:
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        for package, location in MAPPING.items():
            if fullname == package or fullname.startswith(f"{package}."):
                rest = fullname.replace(package, "", 1).strip(".").split(".")
                stem = Path(location, *rest)
                for candidate in chain([stem / "__init__.py"], (stem.with_suffix(".py"),)):
                    if candidate.exists():
                        return spec_from_file_location(fullname, candidate)


def install():
    if not any(finder == _EditableFinder for finder in sys.meta_path):
        sys.meta_path.append(_EditableFinder)
"""
FILES = {
    "namespace/deep/steps.py": STEP,
    "src/layout/src/in_src/__init__.py": "",
    "src/layout/src/in_src/steps.py": STEP,
    "elsewhere/editable/__init__.py": "",
    "elsewhere/editable/steps.py": STEP,
    "hooks/__editable___editable_0_1_finder.py": FINDER,
    "hooks/sitecustomize.py": "import __editable___editable_0_1_finder as finder\nfinder.install()",
    "strings/registry.py": """
import importlib

STEPS = {"sde": "strings.schedulers.FlowMatchSDEDiscreteScheduler", "flux": "strings.steps.flux_step"}


def get(name):
    module, _, attribute = STEPS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
""",
    "strings/schedulers.py": METHOD,
    "strings/steps.py": STEP,
    "relative/__init__.py": "from .inner import flux_step as exported\nfrom .inner.steps import *",
    "relative/inner/__init__.py": "from .steps import flux_step",
    "relative/inner/steps.py": f"__all__ = ['flux_step']\nfrom .. import sibling\n{STEP}",
    "relative/sibling.py": "from . import inner",
    "registered/table.py": "STEPS = {}\n\n\ndef register(f):\n    STEPS[f.__name__] = f\n    return f\n",
    "registered/steps.py": f"from .table import register\n@register\n{STEP}\n"
    "TABLE = {'flux': flux_step}\nROW = [flux_step]\n",
    "circular/first.py": f"{STEP}\nfrom . import second\n",
    "circular/second.py": "from .first import flux_step as taken\n",
    "bound/steps.py": f"import functools\n{STEP}\nBOUND = functools.partial(flux_step, 1)\n",
    "plugin/by_path.py": STEP,
    "lazy.py": STEP,
    "again.py": STEP,
    "compiled.py": STEP,
    "rewritten.py": STEP,
    "of_text.py": STEP,
    "bom.py": f"\ufeff{STEP}",
    "latin.py": f"# -*- coding: latin-1 -*-\nNAME = 'é'\n{STEP}",
    "data/__init__.py": STEP,
    "data/words.txt": "words",
    "places.py": f"""
import contextlib, sys
if sys.version_info > (3,):
    {STEP.replace("return __name__", "return 1").replace(chr(10), chr(10) + "    ")}
    under_if = flux_step
try:
    raise KeyError
except KeyError:
    {STEP.replace("return __name__", "return 2").replace(chr(10), chr(10) + "    ")}
    under_except = flux_step
with contextlib.nullcontext():
    {STEP.replace("return __name__", "return 3").replace(chr(10), chr(10) + "    ")}
    under_with = flux_step
for _ in range(1):
    {STEP.replace("return __name__", "return 4").replace(chr(10), chr(10) + "    ")}
    under_for = flux_step
match 1:
    case 1:
        {STEP.replace("return __name__", "return 5").replace(chr(10), chr(10) + "        ")}
        under_match = flux_step


def outer():
    {STEP.replace(chr(10), chr(10) + "    ")}
    return flux_step


async def dance_grpo_step():
    {STEP.replace(chr(10), chr(10) + "    ")}


class Other:
    {STEP.replace(chr(10), chr(10) + "    ")}
    def sample_previous_step(self): ...


class Step(list):
    def step(self): ...
flow_grpo_step = lambda: 0
""",
    "train.py": """
import ast, importlib, importlib.resources, importlib.util, inspect, json, pickle, pkgutil, sys
from importlib.machinery import SourceFileLoader

import again, bom, bound.steps, circular.first, compiled, data, latin, places, relative
import registered.steps as registered_steps, registered.table
from editable.steps import flux_step as editable_step
from in_src.steps import flux_step as src_step
from namespace.deep.steps import flux_step as g
from strings.registry import get
from zipped.steps import flux_step as zipped_step

import namespace.deep.steps

spec = importlib.util.spec_from_file_location("by_path", "plugin/by_path.py")
by_path = importlib.util.module_from_spec(spec)
spec.loader.exec_module(by_path)
spec = importlib.util.find_spec("lazy")
spec.loader = importlib.util.LazyLoader(spec.loader)
lazy = sys.modules["lazy"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lazy)


class Rewriting(SourceFileLoader):
    # As type checkers do it.
    def source_to_code(self, data, path, *, _optimization=-1):
        tree = compile(data, path, "exec", ast.PyCF_ONLY_AST)
        tree.body += ast.parse("REWRITTEN = True").body
        return compile(tree, path, "exec")


class OfText(SourceFileLoader):
    def source_to_code(self, data, path, *, _optimization=-1):
        return compile(data.decode(), path, "exec")


def loaded(name, loader):
    spec = importlib.util.spec_from_file_location(name, f"{name}.py", loader=loader(name, f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewritten, of_text = loaded("rewritten", Rewriting), loaded("of_text", OfText)
first = again.flux_step
importlib.reload(again)


class Heir(get("sde")):
    pass


class Overridden(get("sde")):
    def sample_previous_step(self, sample):
        return super().sample_previous_step(sample, 0)


"""
    + STEP
    + """

@lambda f: [f]
"""
    + STEP.replace("flux_step", "dance_grpo_step")
    + """

held = {
    "namespace": g, "src": src_step, "editable": editable_step, "string": get("flux"), "zip": zipped_step,
    "string, method": get("sde").sample_previous_step, "inherited": Heir.sample_previous_step,
    "exported": relative.exported, "star": relative.flux_step, "relative": relative.inner.steps.flux_step,
    "circular": circular.second.taken, "by path": by_path.flux_step, "lazy": lazy.flux_step, "again": again.flux_step,
    "dict": registered_steps.TABLE["flux"], "list": registered_steps.ROW[0],
    "registered": registered.table.STEPS["flux_step"], "bound": bound.steps.BOUND.func,
    "mark": bom.flux_step, "encoding": latin.flux_step, "data": data.flux_step, "script": flux_step,
    "rewritten": rewritten.flux_step,
    "decorated in the script": dance_grpo_step[0],
    **{name: value for name, value in vars(places).items() if name.startswith("under_")},
}
left = {"no source": compiled.flux_step, "of text": of_text.flux_step,
        "inside": places.outer(), "method of another": places.Other.flux_step,
        "other class": places.Other.sample_previous_step, "async": places.dance_grpo_step, "step": places.Step.step,
        "lambda": places.flow_grpo_step, "override": Overridden.sample_previous_step}
steps = namespace.deep.steps
facts = {
    "one object": g is steps.flux_step and registered_steps.flux_step is registered_steps.ROW[0],
    "reloaded": again.flux_step is not first, "names": [g.__name__, g.__qualname__, g.__module__],
    "signature": str(inspect.signature(g)), "source": inspect.getsource(g),
    "line": inspect.getsourcelines(flux_step)[1],
    "source of a module": inspect.getsource(steps), "pickled": pickle.loads(pickle.dumps(g)) is g,
    "loader": type(steps.__spec__.loader) is SourceFileLoader and steps.__loader__ is steps.__spec__.loader,
    "cached": [steps.__cached__, steps.__spec__.cached, steps.__file__], "package": steps.__package__,
    "path": [str(p) for p in namespace.deep.__path__], "latin": latin.NAME, "rewritten": rewritten.REWRITTEN,
    "resource": importlib.resources.files("data").joinpath("words.txt").read_text(),
    "get_data": pkgutil.get_data("data", "words.txt").decode(),
    "get_source": steps.__loader__.get_source(steps.__name__),
    "meta_path": [getattr(f, "__name__", type(f).__name__) for f in sys.meta_path], "torch": "torch" in sys.modules,
    "dir": [n for n in dir(steps) if n != "__builtins__"], "annotations": __annotations__,
}
print(json.dumps({"held": {k: hasattr(f, "__wrapped__") for k, f in held.items()},
                  "left": {k: hasattr(f, "__wrapped__") for k, f in left.items()}, "facts": facts}))
""",
}


def seen(root: Path, *command: str) -> tuple[dict[str, Any], str]:
    done = python(root, *command, "train.py", path=[root / "hooks", root / "src/layout/src", root / "zipped.zip"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found under plain Python, under `run`, and what was said."""
    root = tmp_path_factory.mktemp("repository")
    write(root, {name: text.replace("%s", str(root / "elsewhere/editable")) for name, text in FILES.items()})
    (root / "latin.py").write_text(FILES["latin.py"], encoding="latin-1")
    with zipfile.ZipFile(root / "zipped.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/steps.py", STEP)
    done = python(root, "-c", "import compileall; compileall.compile_file('compiled.py', legacy=True, quiet=1)")
    assert done.returncode == 0, done.stderr
    (root / "compiled.py").unlink()
    ours, said = seen(root, *RUN)
    # Afterwards: what `run` left in __pycache__ must be Python's.
    plain, _ = seen(root)
    again, _ = seen(root, *RUN)
    assert again == ours
    return {"ours": ours, "plain": plain, "said": said}


def test_every_shape_is_replaced_where_it_is_defined(states: dict[str, Any]) -> None:
    assert {name for name, replaced in states["ours"]["held"].items() if not replaced} == set()
    assert not any(states["plain"]["held"].values())


def test_what_is_not_known_is_left_alone(states: dict[str, Any]) -> None:
    assert states["ours"]["left"] == states["plain"]["left"]
    assert [line for line in states["said"].splitlines() if "left alone" in line] == [
        f"{SAID}compiled.py: its functions are left alone: OSError: it has no source",
        f"{SAID}of_text.py: its functions are left alone: AttributeError: 'Module' object has no attribute 'decode'",
    ]


FACTS = (
    "one object, reloaded, names, signature, source, line, source of a module, pickled, loader, cached, package, path, "
    "latin, rewritten, resource, get_data, get_source, meta_path, torch, dir, annotations"
)


@pytest.mark.parametrize("name", FACTS.split(", "))
def test_modules_are_as_python_makes_them(name: str, states: dict[str, Any]) -> None:
    assert states["ours"]["facts"].keys() == states["plain"]["facts"].keys() == set(FACTS.split(", "))
    assert states["ours"]["facts"][name] == states["plain"]["facts"][name]


def test_only_and_skip(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(STEP + METHOD)
    (tmp_path / "train.py").write_text(
        f"import one\n{STEP}\nprint([hasattr(f, '__wrapped__') for f in (one.flux_step, flux_step, "
        "one.FlowMatchSDEDiscreteScheduler.sample_previous_step)])"
    )
    for options, wanted in {
        "": [True, True, True],
        "--only flux_step": [True, True, False],
        "--only=one:flux_step": [True, False, False],
        "--skip __main__:flux_step": [True, False, True],
        "--only flux_step,FlowMatchSDEDiscreteScheduler.sample_previous_step --skip one:flux_step": [False, True, True],
    }.items():
        done = python(tmp_path, *RUN, *options.split(), "train.py")
        assert done.stdout == f"{wanted}\n" and "no such function" not in done.stderr, done.stderr


def test_what_waits_for_a_module_gets_it_when_it_has_been_executed(tmp_path: Path) -> None:
    script = """
import multiprocessing


def told():
    from diffusers.configuration_utils import ConfigMixin
    print(hasattr(ConfigMixin.from_config, "__wrapped__"))


if __name__ == "__main__":
    told()
    child = multiprocessing.get_context("spawn").Process(target=told)
    child.start()
    child.join()
"""
    # In place of the real one, whose configurations make models.
    mixin = "class ConfigMixin:\n    @classmethod\n    def from_config(cls): ...\n"
    write(tmp_path, {"diffusers/__init__.py": "", "diffusers/configuration_utils.py": mixin, "train.py": script})
    for options, wanted in ((), False), (("--accelerate", "lossless"), True):
        assert python(tmp_path, *RUN, *options, "train.py").stdout == f"{wanted}\n" * 2
