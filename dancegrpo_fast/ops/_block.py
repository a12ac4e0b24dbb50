"""What the ops of transformer blocks share: which implementation runs, gradients of the reference, recomputation."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backends
from ..checks import SMALLEST, check_choice, check_int, check_number
from ._checks import check_float

MODES = ("lossless", "fast")


class Cost(NamedTuple):
    """What a call computes, moves and keeps; inputs read once, outputs written once, statistics included."""

    flops_forward: int
    flops_backward: int
    bytes_forward: int
    bytes_backward: int
    bytes_saved: int


@cache
def _triton_module(op: str) -> ModuleType:
    return importlib.import_module(f"._triton_{op}", __package__)


def triton_module(op: str, backend: str, x: Tensor, *more: Tensor | None) -> Any | None:
    """The module that launches this op's Triton kernels, or None where the reference runs, as with any float64."""
    double = any(t is not None and t.dtype == torch.float64 for t in (x, *more))
    picked = backends.pick_block(backend, x.device, torch.float64 if double else x.dtype)
    return _triton_module(op) if picked == "triton" else None


def check_mode(mode: Any) -> None:
    """One of the two roundings."""
    check_choice("mode", mode, MODES)


def check_settings(mode: Any, backend: Any) -> None:
    """A rounding, and the name of a backend."""
    check_mode(mode)
    backends.check_name(backend)


def check_autocast(x: Tensor) -> None:
    """No autocast: it would compute the products of a forward in another dtype than those of its backward."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        raise ValueError("autocast: got a call under it, want it off, as the products are of the dtype given")


def check_eps(eps: Any) -> float:
    """A positive number."""
    return check_number("eps", eps, SMALLEST, wanted="a finite number above 0")


def check_tokens(name: str, value: Any) -> None:
    """A float tensor `[B, S, C]` with elements, contiguous in its last dimension."""
    check_float(name, value)
    if value.ndim != 3 or value.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want [B, S, C] with at least one element")


def check_tokens_like(name: str, value: Any, like: Tensor, like_name: str) -> None:
    """A float tensor of another's shape on its device."""
    check_float(name, value)
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want that of {like_name}, {tuple(like.shape)}")
    check_device(name, value, like, like_name)


def check_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Both on one device."""
    if value.device != like.device:
        offloaded = "; whoever offloaded it must put it back before the block is called" if value.is_meta else ""
        raise ValueError(
            f"{name}: got a tensor on {value.device}, want it on {like_name}'s device, {like.device}{offloaded}"
        )


def check_operand(name: str, value: Any, wanted: tuple[Any, ...], dtype: torch.dtype, like: Any, given: str) -> None:
    """A float tensor of this shape and dtype, on the device of `like`, a pair of a name and a tensor; or None."""
    if value is None:
        return
    check_float(name, value)
    check_device(name, value, like[1], like[0])
    if value.shape != wanted or value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype} of {tuple(value.shape)}, want {dtype} of {wanted} for {given}")


def check_channels(name: str, value: Any, x: Tensor) -> None:
    """A float tensor `[C]`, or None."""
    if value is None:
        return
    check_float(name, value)
    if value.shape != x.shape[-1:]:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want ({x.shape[-1]},) for x of {tuple(x.shape)}")
    check_device(name, value, x, "x")


def check_parameter(name: str, value: Tensor | None, x: Tensor, split: int | None) -> None:
    """`[B, C]`, `[B, 1, C]`, `[B, S, C]` or, with `split`, `[B, 2, C]`; or None."""
    if value is None:
        return
    check_float(name, value)
    check_device(name, value, x, "x")
    batch, tokens, channels = x.shape
    shape = (batch, 1, *value.shape[1:]) if value.ndim == 2 and len(value) == batch else tuple(value.shape)
    rows = (1, tokens) if split is None else (2,)
    if len(shape) != 3 or (shape[0], shape[2]) != (batch, channels) or shape[1] not in rows:
        wanted = f"[{batch}, {channels}] or [{batch}, {tokens}, {channels}]"
        wanted = wanted if split is None else f"[{batch}, 2, {channels}], as split is given"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {wanted} for x of {tuple(x.shape)}")


def as_rows(parameter: Tensor | None) -> Tensor | None:
    """`[B, C]` as `[B, 1, C]`."""
    return parameter.unsqueeze(1) if parameter is not None and parameter.ndim == 2 else parameter


def check_split(split: Any, x: Tensor) -> int:
    """The token, up to their number, from which the second row of parameters counts; -1 for None."""
    return -1 if split is None else check_int("split", split, 0, x.shape[1], " or None")


def contiguous_like(x: Tensor) -> Tensor:
    """Room without gaps for numbers of x's shape and dtype."""
    # Twice as fast without the argument.
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_unless(wanted: bool, like: Tensor | None) -> Tensor | None:
    """Contiguous room for a gradient, or None."""
    if not wanted or like is None:
        return None
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def unpacked(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The results that are wanted; a registered op returns an empty tensor for others."""
    return [t if keep else None for t, keep in zip(tensors, wanted, strict=True)]


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd where it was left already: an op's implementation runs below it, in compiled graphs without its keys."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def reference_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by the wanted inputs, by eager torch through `function`: its own operations, so its own bits."""
    with _autograd():
        leaves = [
            None if t is None else t.detach().requires_grad_(keep) for t, keep in zip(inputs, wanted, strict=True)
        ]
        result = function(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
            if pairs and asked
            else [None] * len(asked)
        )
    gradients: list[Tensor | None] = []
    for leaf, keep in zip(leaves, wanted, strict=True):
        grad = next(found) if keep and leaf is not None else None
        if keep and leaf is not None and grad is None:
            grad = torch.zeros_like(leaf)
        gradients.append(None if grad is None else grad.contiguous())
    return gradients


def summed(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of one tensor's consumers in the order autograd adds them: the last consumer's first."""
    total = grads[-1]
    for grad in reversed(grads[:-1]):
        total = total + grad
    return total


def weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """`grad^T inputs` `[C, K]` of rows, in float32 at least, as it is summed or scaled once more."""
    if grad.dtype in (torch.float32, torch.float64):
        return grad.t() @ inputs
    if grad.is_cuda:
        return torch.mm(grad.t(), inputs, out_dtype=torch.float32)
    return grad.t().float() @ inputs.float()


def prepare(ctx: Any) -> None:
    """Called in an op's forward, so that its outputs can be computed again."""
    ctx.kept = ctx.recomputed = None


def saved(ctx: Any) -> tuple[Any, ...]:
    """What the forward saved, in the backward; drops what was computed again."""
    kept, ctx.kept, ctx.recomputed = ctx.kept, None, None
    return ctx.saved_tensors if kept is None else kept  # type: ignore[no-any-return]  # ctx has no type


def _recomputed(node: Any, index: int) -> Tensor:
    if node.recomputed is None:
        # Kept until the backward: inside a checkpoint saved tensors can be asked for only once.
        node.kept = node.saved_tensors
        with torch.no_grad():
            node.recomputed = node._forward_cls.recompute(node.kept, node.settings)
    # Aliases of one output count on behind it.
    tensor: Tensor = node.recomputed[min(index, len(node.recomputed) - 1)]
    return tensor


@contextlib.contextmanager
def recomputed(*outputs: Tensor) -> Iterator[None]:
    """Inside, autograd keeps none of these outputs of block ops: backward computes them again from what the op kept.

    They come back bit for bit, whichever modules (LoRA or quantised layers among them) want them. The second copy
    lives from the first backward that asks for it until the op's own. An op whose inputs need no gradient keeps nothing
    to recompute from, so its output is kept as it is. Everything else goes where it went before, to a checkpoint say.
    """
    sources: dict[int, tuple[Any, int]] = {}
    # A compiled graph decides by itself what it keeps.
    for tensor in () if torch.compiler.is_compiling() else outputs:
        node = tensor.grad_fn
        function = getattr(node, "_forward_cls", None)
        if hasattr(function, "recompute") and getattr(node, "recomputable", True):
            sources[tensor.untyped_storage()._cdata] = (node, tensor.output_nr)
    if not sources:
        yield
        return

    # Hooks hide those around them, and torch has no public way to ask for these.
    around = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> Any:
        source = sources.get(tensor.untyped_storage()._cdata)
        if source is None or isinstance(tensor, torch.nn.Parameter):
            return None, tensor if around is None else around[0](tensor)
        return *source, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        node, index, *geometry = saved
        if node is None:
            tensor: Tensor = index if around is None else around[1](index)
            return tensor
        return _recomputed(node, index).as_strided(*geometry)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def register_flops(name: str, formula: Callable[..., int]) -> None:
    """Makes torch's FLOP counter count an op; `formula` gets the op's arguments."""
    register_flop_formula(getattr(torch.ops.dgf, name), get_raw=True)(
        lambda *arguments, out_val=None, **kwargs: formula(*arguments, **kwargs)
    )
