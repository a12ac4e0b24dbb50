"""Which results of a diffusers model's blocks are kept for the backward, and which are computed again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from ..checks import check_bool
from .offload import HostInputs
from .operators import GROUPS, group

# The rest is casts, views, copies and small sums, which later ops write into.
KEEPABLE = GROUPS[:6]


@dataclass(frozen=True)
class Keep:
    """A checkpointed block that keeps its inputs and what the ops of these groups return, and computes the rest again.

    Views, in-place results, casts and ops that draw random numbers are never kept: the first cost nothing, and a kept
    draw would leave the generator behind for the next one.

    Raises:
        ValueError: a group that is unknown or not in `KEEPABLE`.
    """

    groups: frozenset[str] = frozenset()

    def __init__(self, groups: Iterable[str] = ()) -> None:
        chosen = frozenset([groups] if isinstance(groups, str) else groups)
        if unknown := sorted(chosen - set(KEEPABLE)):
            raise ValueError(f"groups: got {', '.join(map(str, unknown))}, want some of {', '.join(KEEPABLE)}")
        object.__setattr__(self, "groups", chosen)

    def __str__(self) -> str:
        return next((name for name, policy in NAMED.items() if policy == self), "keep " + "+".join(sorted(self.groups)))


NAMED: dict[str, Keep | None] = {
    "none": None,
    "full": Keep(),
    "attention": Keep({"attention"}),
    "matmul": Keep({"attention", "matmul"}),
}


@dataclass(frozen=True)
class FirstBlocks:
    """Checkpoints the first `count` blocks by `policy`, in the order in which the model runs them.

    The first blocks are computed again last, when what the later ones kept is gone.
    """

    count: int
    policy: str | Keep = "full"


@dataclass(frozen=True)
class PerBlock:
    """One policy for every block, in the order in which the model runs them; None or "none" keeps a block whole."""

    policies: tuple[str | Keep | None, ...]


Policy: TypeAlias = str | Keep | FirstBlocks | PerBlock


def unwrapped(model: nn.Module) -> Any:
    """The diffusers model inside DDP, a compiled module or a PeftModel.

    Raises:
        ValueError: it is none that can be checkpointed.
    """
    inner: Any = model
    while not getattr(type(inner), "_supports_gradient_checkpointing", False):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(found := getattr(inner, "_orig_mod", None) or getattr(inner, "module", None), nn.Module):
            inner = found
        else:
            kind = type(model)
            raise ValueError(f"model: got {kind.__module__}.{kind.__name__}, want a diffusers model with blocks")
    return inner


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that diffusers checkpoints, in the order in which the model runs them.

    A transformer's blocks; in a UNet the ResNets and the transformer blocks between them.

    Raises:
        ValueError: a model without such blocks.
    """
    inner = unwrapped(model)
    if hasattr(inner, "down_blocks") and hasattr(inner, "up_blocks"):
        middle = [inner.mid_block] if getattr(inner, "mid_block", None) is not None else []
        found = [part for stage in (*inner.down_blocks, *middle, *inner.up_blocks) for part in _stage(stage)]
    else:
        lists = [child for child in inner.children() if isinstance(child, nn.ModuleList)]
        found = [block for held in lists for block in held if _is_block(block)]
    if not found:
        raise ValueError(f"model: got a {type(inner).__name__}, want a model with lists of blocks")
    return found


def block_paths(model: nn.Module) -> list[str]:
    """The names of `blocks_of` a model in it."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks_of(model)]


def _is_block(module: nn.Module) -> bool:
    return type(getattr(module, "_orig_mod", module)).__name__.endswith("Block")


def _stage(stage: nn.Module) -> Iterator[nn.Module]:
    parts: Any = stage
    resnets, attentions = list(parts.resnets), list(getattr(parts, "attentions", ()))
    runs = [([resnet] for resnet in resnets), (getattr(a, "transformer_blocks", ()) for a in attentions)]
    if "MidBlock" in type(stage).__name__:
        # diffusers never checkpoints the first ResNet here.
        runs = [runs[1], ([resnet] for resnet in resnets[1:])]
    for pair in zip_longest(*runs, fillvalue=()):
        yield from chain(*pair)


def resolve(policy: Policy, count: int) -> tuple[Keep | None, ...]:
    """One choice for each of `count` blocks: what it keeps, or None where nothing is computed again.

    Raises:
        ValueError: an unknown policy, or one for another number of blocks.
    """
    if isinstance(policy, FirstBlocks):
        if isinstance(policy.count, bool) or not isinstance(policy.count, int) or not 0 <= policy.count <= count:
            raise ValueError(
                f"policy: got FirstBlocks({policy.count}), want an int from 0 to the model's {count} blocks"
            )
        return (_single(policy.policy),) * policy.count + (None,) * (count - policy.count)
    if isinstance(policy, PerBlock):
        if len(policy.policies) != count:
            raise ValueError(f"policy: got PerBlock for {len(policy.policies)} blocks, want the model's {count}")
        return tuple(None if one is None else _single(one) for one in policy.policies)
    return (_single(policy),) * count


def _single(policy: object) -> Keep | None:
    if isinstance(policy, Keep):
        return policy
    if isinstance(policy, str) and policy in NAMED:
        return NAMED[policy]
    got = f'"{policy}"' if isinstance(policy, str) else repr(policy)
    raise ValueError(f"policy: got {got}, want one of {', '.join(NAMED)}, Keep(groups), FirstBlocks(k) or PerBlock")


def keeps(groups: frozenset[str], op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the results of this call are kept by `Keep(groups)`."""
    # Higher-order ops, flex_attention among them, have a name only.
    schema = getattr(op, "_schema", None)
    name: str = op.name() if schema is None else schema.name
    # No casts: autocast may have remembered one by the second time, which would shift the results of those after it.
    if group(name) not in groups:
        return False
    if schema is None:
        return True
    # Views share their base, and what is written in place could change after it was kept.
    if any(value.alias_info is not None for value in (*schema.arguments, *schema.returns)):
        return False
    for i, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            return not (args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value))
    return torch.Tag.nondeterministic_seeded not in op.tags


def _choose(groups: frozenset[str], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(groups, op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


Contexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def _contexts(policy: Keep) -> Contexts:
    if not policy.groups:
        return noop_context_fn
    return partial(create_selective_checkpoint_contexts, partial(_choose, policy.groups))


def is_compiled(block: nn.Module) -> bool:
    """Whether a block was compiled by itself."""
    return block._compiled_call_impl is not None or hasattr(block, "_orig_mod")


def _uncached(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block, without the casts of weights that autocast would keep until it is left, and without earlier ones."""
    if torch.compiler.is_compiling() or not torch.is_autocast_cache_enabled():
        return block(*args, **kwargs)
    torch.clear_autocast_cache()
    try:
        return block(*args, **kwargs)
    finally:
        torch.clear_autocast_cache()


class Checkpointed:
    """A policy in a model. Calling it puts back what was there before.

    Attributes:
        policies: for each block what it keeps, or None where nothing is computed again.
        offload: whether block inputs wait for the backward in host memory.
    """

    def __init__(self, model: nn.Module, policy: Policy, offload: bool) -> None:
        self.model = unwrapped(model)
        blocks = blocks_of(self.model)
        self.policies = resolve(policy, len(blocks))
        self.offload = offload
        self._contexts = {
            block: None if choice is None else _contexts(choice)
            for block, choice in zip(blocks, self.policies, strict=True)
        }
        for block in blocks:
            self._check_compiled(block)
        self._host = HostInputs() if offload else None
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        self._before = [
            (module, {name: vars(module)[name] for name in names if name in vars(module)})
            for module in self.model.modules()
            if hasattr(module, "gradient_checkpointing")
        ]
        if any(choice is not None for choice in self.policies):
            # One object, so that undoing can tell whether it is still in place.
            self._function: Callable[..., Any] | None = self._run
            self.model.enable_gradient_checkpointing(self._function)
        else:
            self._function = None
            self.model.disable_gradient_checkpointing()

    def _check_compiled(self, block: nn.Module) -> None:
        contexts = self._contexts[block]
        if contexts is None or contexts is noop_context_fn or not is_compiled(block):
            return
        raise ValueError(
            "policy: got one that keeps results of single ops, with blocks compiled one by one (their ops cannot be"
            ' seen); want "none", "full" or FirstBlocks(k), or torch.compile of the whole model'
        )

    def _run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if block not in self._contexts:
            raise RuntimeError(
                f"block: got a {type(block).__name__} that the model did not have when apply() was called"
            )
        contexts = self._contexts[block]
        if contexts is None:
            return block(*args, **kwargs)
        if self._host is None:
            if not torch.compiler.is_compiling():
                self._check_compiled(block)
            # torch.compile knows the default context by its absence only.
            selective: dict[str, Any] = {} if contexts is noop_context_fn else {"context_fn": contexts}
            return checkpoint(_uncached, block, *args, use_reentrant=False, **selective, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError("offload: got True inside torch.compile of the whole model, want its blocks compiled")
        self._check_compiled(block)
        return self._host.checkpoint(partial(_uncached, block), args, kwargs, contexts)

    def __call__(self) -> None:
        """Restores the model.

        Raises:
            RuntimeError: its checkpointing was changed since; nothing is changed then.
        """
        enabled = self._function is not None
        for module, _ in self._before:
            current: Any = module
            if current.gradient_checkpointing != enabled or (
                enabled and current._gradient_checkpointing_func is not self._function
            ):
                raise RuntimeError("undo: the model's checkpointing was changed after apply(); undo that first")
        for module, before in self._before:
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                vars(module).pop(name, None)
            vars(module).update(before)
        self._before = []


def apply(model: nn.Module, policy: Policy, *, offload: bool = False) -> Checkpointed:
    """Sets what the blocks of a diffusers model keep for the backward. Results and gradients stay bit for bit the same.

    Works before or after LoRA, `accelerate()` of the blocks, FSDP2 and `torch.compile`; selective policies see the ops
    of a model that is compiled as a whole, not those of blocks that are compiled one by one. Under autocast, casts of a
    checkpointed block's weights are dropped after the block instead of staying until autocast is left; where several
    forwards share one autocast region, their gradients are therefore added in the weights' own dtype.

    Args:
        model: a diffusers transformer or UNet; also inside a PeftModel, DDP or compiled module.
        policy: "none"; "full" (keep block inputs); "attention" (also what attention returns); "matmul" (also what
            matrix products and convolutions return); `Keep(groups)`; `FirstBlocks(k)`; `PerBlock(policies)`.
        offload: the inputs of checkpointed blocks wait in host memory: pinned, copied while the next block computes and
            fetched while the block after it runs backward, on a GPU; copied at once on the CPU.

    Returns:
        A callable that restores the model.

    Raises:
        ValueError: a model without blocks, an unknown policy, one for another number of blocks, selective
            checkpointing of compiled blocks, or offload without checkpointing. The model is unchanged then.
    """
    check_bool("offload", offload)
    choices = resolve(policy, len(blocks_of(model)))
    if offload and all(choice is None for choice in choices):
        raise ValueError("offload: got True with a policy that checkpoints nothing, want one that does")
    return Checkpointed(model, policy, offload)
