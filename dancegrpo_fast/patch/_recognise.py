"""How a patch knows the code that it stands in for: sources by their fingerprints, and checks of modules."""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ._fingerprints import fingerprint
from ._layers import HOOKS
from ._pieces import Blocks

NORMALIZATION = "diffusers.models.normalization"
EMBEDDINGS = "diffusers.models.embeddings"
ATTENTION = "diffusers.models.attention"
ACTIVATIONS = "diffusers.models.activations"


@dataclass(frozen=True)
class Family:
    """One architecture: what it replaces, and the sources that it was written for.

    `sources` maps "module:qualified name" to the fingerprint of the code that the patch stands in for. `check` raises
    for a model that cannot be patched; `forwards` gives each module's new forward. `trims`: its attention gets a
    mask of padded text, which `trim_text` does without.
    """

    name: str
    sources: dict[str, str]
    check: Callable[[nn.Module], None]
    forwards: Callable[[nn.Module, Blocks], Iterable[tuple[nn.Module, Callable[..., Any]]]]
    trims: bool = False


def resolve(path: str) -> Callable[..., Any] | None:
    """The function at "module:qualified name" (a class or a module, too), or None where there is none."""
    module, _, name = path.partition(":")
    try:
        found: Any = __import__(module, fromlist=["_"])
        for part in filter(None, name.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return cast(Callable[..., Any], found)


def check_sources(family: Family) -> None:
    """Refuses code that differs from what the patch was written for."""
    import diffusers

    for path, known in family.sources.items():
        function = resolve(path)
        if function is None or fingerprint(function) != known:
            state = "is missing" if function is None else "differs from the code that this patch replaces"
            raise ValueError(
                f"transformer: got a {family.name} of diffusers {diffusers.__version__}, whose {path.replace(':', '.')}"
                f" {state}; want a version with the code of diffusers 0.42.1"
            )


def _passed_by(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What eager calls within a block and a replacement need not: all but linear layers, activations and dropouts."""
    for name, child in module.named_children():
        # Those with adapters have a base layer.
        if isinstance(child, (nn.Linear, nn.SiLU, nn.Dropout)) or hasattr(child, "base_layer"):
            continue
        if not isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield f"{prefix}{name}", child
        yield from _passed_by(child, f"{prefix}{name}.")


def _attached(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward; accelerate's offloading `affine_of` sees to."""
    return any(getattr(module, name) for name in HOOKS) or (
        "forward" in vars(module) and not hasattr(module, "_hf_hook")
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no type for it
def _hooked(block: nn.Module) -> bool:
    """Whether something is attached to what a replacement passes by, which is then said."""
    for name, module in _passed_by(block):
        if _attached(module):
            warnings.warn(
                f"{type(block).__name__}.{name} has a hook: the block runs as diffusers has it, without block ops",
                stacklevel=2,
            )
            return True
    return False


class _Watch:
    """Whether anything is attached in a block: what is looked at is found once, as it is asked in every call."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], list[Any]]] = weakref.WeakKeyDictionary()

    def __call__(self, block: nn.Module) -> bool:
        found = self._found.get(block)
        if found is None:
            modules = [module for _, module in _passed_by(block)]
            found = [getattr(one, name) for one in modules for name in HOOKS], [vars(one) for one in modules]
            self._found[block] = found
        hooks, attributes = found
        if not any(hooks) and not any("forward" in one for one in attributes):
            return False
        return bool(_hooked(block))


def following(family: Family, forward: Callable[..., Any], is_block: bool) -> Callable[..., Any]:
    """`forward` as long as the code that it stands in for is what it was and is called, else the module's own.

    A script may put its own forward or processor into diffusers' classes after its model was accelerated, and hooks
    on modules in a block whose work the replacement does itself.
    """
    watch = _Watch()
    places = [path.partition(":")[::2] for path in family.sources]
    known: list[tuple[Any, str, Any]] = []
    for module, name in places:
        owner, _, last = name.rpartition(".")
        known.append((resolve(f"{module}:{owner}"), last, resolve(f"{module}:{name}")))

    @functools.wraps(forward)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if is_block and _hooked(self):
                return type(self).forward(self, *args, **kwargs)
        else:
            if is_block and watch(self):
                return type(self).forward(self, *args, **kwargs)
            for home, name, function in known:
                if getattr(home, name) is not function:
                    where = f"{home.__name__}.{name}"
                    warnings.warn(
                        f"{where} was changed after accelerate(): {type(self).__name__} runs as diffusers has it now",
                        stacklevel=2,
                    )
                    return type(self).forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return followed


def want(condition: bool, where: str, got: Any, wanted: str) -> None:
    """Refuses a module that differs from what the replacement computes."""
    if not condition:
        raise ValueError(f"transformer.{where}: got {got}, want {wanted}")


def check_block(block: nn.Module, where: str, *kinds: str) -> None:
    """A block of one of these classes."""
    want(type(block).__name__ in kinds, where, type(block).__name__, " or ".join(kinds))


def check_plain_layer_norms(block: nn.Module, where: str, *names: str) -> None:
    """LayerNorms over one dimension without weights, by their names in a block."""
    for name in names:
        module = block.get_submodule(name)
        plain = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and not module.elementwise_affine
        want(plain, f"{where}.{name}", module, "a LayerNorm without weights")


def check_feed_forwards(block: nn.Module, where: str, *names: str) -> None:
    """Linear, GELU in its tanh form, dropout, linear, by their names in a block."""
    for name in names:
        module = block.get_submodule(name)
        layers: Any = getattr(module, "net", ())
        fits = len(layers) == 3 and type(layers[0]).__name__ == "GELU" and layers[0].approximate == "tanh"
        want(fits, f"{where}.{name}", module, "a FeedForward with a tanh GELU and three layers")


def check_processor(module: nn.Module, where: str, name: str) -> None:
    """The attention processor that the patch computes the same as."""
    processor = getattr(module, "processor", None)
    want(type(processor).__name__ == name, f"{where}.processor", type(processor).__name__, name)


def check_rms_norms(attn: nn.Module, where: str, names: tuple[str, ...]) -> None:
    """diffusers' RMSNorm without a bias on all of these, or on none, with one epsilon."""
    norms = [getattr(attn, name) for name in names]
    if all(norm is None for norm in norms):
        return
    for name, norm in zip(names, norms, strict=True):
        fits = type(norm).__name__ == "RMSNorm" and getattr(norm, "bias", None) is None and norm.eps == norms[0].eps
        want(fits, f"{where}.{name}", norm, "an RMSNorm without bias, with the epsilon of the others")
        module = type(norm).__module__
        want(module == "diffusers.models.normalization", f"{where}.{name}", f"one of {module}", "diffusers' RMSNorm")


def no_arguments(name: str, given: Any) -> None:
    """Refuses arguments that the replaced processor would have used."""
    if given:
        raise ValueError(f"{name}: got {sorted(given)}, want none with an accelerated transformer; undo() it first")


def forwards_of(**makers: Callable[[Blocks], Callable[..., Any]]) -> Any:
    """A family's `forwards`: every block of the lists of these names, with the forward that `makers` gives for them."""

    def forwards(transformer: nn.Module, blocks: Blocks) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        for name, maker in makers.items():
            forward = maker(blocks)
            yield from ((block, forward) for block in getattr(transformer, name))

    return forwards
