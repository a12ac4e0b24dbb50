"""The import hook of `run`: a function with a known name is replaced as it is defined. Needs no torch.

Modules are found and loaded by Python's own finders and loaders. What changes is code, and only that of a module which
defines such a function: it is compiled again from its source, with a decorator on that function. So whoever takes the
function, a registry, a circular import, a subclass, gets what stands in for it.
"""

import ast
import builtins
import functools
import importlib.machinery
import runpy
import sys
import warnings
import zipimport
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .known import candidates
from .settings import say
from .source import HOOK, METHODS, defines, hooked

Define = Callable[[FunctionType], Any]
_LOADERS = (importlib.machinery.SourceFileLoader, importlib.machinery.SourcelessFileLoader, zipimport.zipimporter)
_OURS = __name__.partition(".")[0]


def install(define: Define, watch: Mapping[str, Callable[[ModuleType], object]]) -> None:
    """From now on known functions go through `define` where they are defined. Once in a process.

    Args:
        define: gets the function, returns what its module shall hold; the same for the same function.
        watch: for a module's name, what is called with the module once it has been executed.
    """
    setattr(builtins, HOOK, define)
    for loader in _LOADERS:
        _wrap(_home(loader, "get_code"), "get_code", _get_code)
    _wrap(runpy, "_get_code_from_file", _get_code_from_file)
    if watch:
        _wrap(_home(_LOADERS[0], "exec_module"), "exec_module", lambda original: _exec_module(original, watch))


def _home(cls: type, name: str) -> Any:
    """The class that a method comes from, so that all loaders that inherit it are served."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _wrap(home: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = vars(home)[name]
    wrapped = wrapper(original)
    # Python leaves frames of this file name out of the tracebacks of imports.
    wrapped.__code__ = wrapped.__code__.replace(co_filename=original.__code__.co_filename)
    setattr(home, name, wrapped)


def _get_code(original: Any) -> Any:
    def get_code(self: Any, fullname: str) -> CodeType | None:
        code: CodeType | None = original(self, fullname)
        if code is None or not defines(code) or fullname.partition(".")[0] == _OURS:
            return code
        return _again(code, lambda: self.get_source(fullname), getattr(self, "source_to_code", _compile))

    return get_code


def _get_code_from_file(original: Any) -> Any:
    """For `runpy.run_path`, by which spawned processes run the script again."""

    def get_code_from_file(*args: Any) -> Any:
        found = original(*args)
        # A pair until Python 3.12.
        code, *rest = found if isinstance(found, tuple) else (found,)
        if defines(code):
            code = _again(code, Path(code.co_filename).read_bytes, _compile)
        return (code, *rest) if isinstance(found, tuple) else code

    return get_code_from_file


def _exec_module(original: Any, watch: Mapping[str, Callable[[ModuleType], object]]) -> Any:
    def exec_module(self: Any, module: ModuleType) -> None:
        original(self, module)
        if module.__name__ in watch:
            watch[module.__name__](module)

    return exec_module


def _compile(tree: ast.Module, path: str) -> CodeType:
    return compile(tree, path, "exec", dont_inherit=True)


def _again(code: CodeType, source: Callable[[], str | bytes | None], to_code: Callable[..., Any]) -> CodeType:
    """The code with the hook, or as it was where its source cannot be had."""
    try:
        text = source()
        if text is None:
            raise OSError("it has no source")
        with warnings.catch_warnings():
            # Said when it was compiled first.
            warnings.simplefilter("ignore")
            found: CodeType = to_code(hooked(text, code.co_filename), code.co_filename)
    except Exception as error:  # of a loader that reads or compiles in its own way; the script goes on as it is
        say(f"{code.co_filename}: its functions are left alone: {type(error).__name__}: {error}")
        return code
    return found


def replace_loaded(define: Define) -> None:
    """Replaces known functions in modules that were executed before the hook was there, by a fork server for one."""
    stands: dict[int, Any] = {}

    def put(names: Mapping[str, Any], owner: str | None, hold: Callable[[str, Any], None]) -> None:
        for name, value in list(names.items()):
            # By type alone: a lazy object may do anything when it is asked.
            if issubclass(type(value), type) and owner is None and name in METHODS:
                put(vars(value), name, functools.partial(setattr, value))
            elif type(value) is FunctionType and candidates(value.__name__, owner):
                if id(value) not in stands and value.__code__.co_name != value.__name__:
                    say(f"{value.__module__}.{value.__qualname__}: left alone: decorated and imported before the hook")
                    continue
                if id(value) not in stands:
                    stand = define(value)
                    stands[id(value)] = stands[id(stand)] = stand
                hold(name, stands[id(value)])

    for module in list({id(module): module for module in sys.modules.values()}.values()):
        if type(module) is ModuleType and module.__name__.partition(".")[0] != _OURS:
            scopes = {id(vars(module)): vars(module)}
            if module.__name__ == "__mp_main__":
                # A copy: the script's functions look their names up where it was executed.
                own = [f for f in vars(module).values() if type(f) is FunctionType and f.__module__ == module.__name__]
                scopes |= {id(f.__globals__): f.__globals__ for f in own}
            for scope in scopes.values():
                put(scope, None, scope.__setitem__)
