"""Sequence parallelism: the tokens of a sample are split among several processes, which all have its weights.

Of W processes every N neighbours form a group that draws and trains on the same samples. Between a transformer's blocks
each has 1/N of the tokens; under Ulysses (arXiv:2309.14509) it has all tokens of 1/N of the heads within attention, for
which queries, keys, values and results change hands; with a ring (arXiv:2310.01889) its own queries and the keys and
values of one process after the other. The output is gathered, so that each of the group sees the whole of it.

Splitting, gathering and the ring are diffusers' context parallelism. Its gather hands each process the gradient of its
own tokens, so that a parameter's gradient is the sum over the group. Its Ulysses is not used: it computes attention
again in the backward, and there without autocast.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .activations.checkpointing import blocks_of

SETTING = "train.sequence_parallel"
RING_SETTING = "train.sequence_kind"

# Attention backends of diffusers with Ulysses around them, and its ring as checkpoints can have it.
_ours: set[Any] = set()


@dataclass(frozen=True)
class Family:
    """What splitting a class of denoisers has to know.

    Attributes:
        text: the blocks split the text's tokens, too.
        masked: attention gets a mask, which a ring cannot split.
    """

    text: bool
    masked: bool = False


FAMILIES = {
    "FluxTransformer2DModel": Family(text=True),
    "HunyuanVideoTransformer3DModel": Family(text=True, masked=True),
    "QwenImageTransformer2DModel": Family(text=True, masked=True),
    "WanTransformer3DModel": Family(text=False),
}
REFUSED = {
    "SD3Transformer2DModel": "whose attention calls torch's SDPA past diffusers' context parallelism",
    "UNet2DConditionModel": "whose convolutions need the neighbours of every latent",
}


class SequenceGroup:
    """The processes that share this one's samples.

    Args:
        device: of this process.
        processes: of the run.
        size: of a group, N of at least 2.
        kind: "ulysses" or "ring".

    Attributes:
        index, count: of this process's group, and how many there are.
        member: of this process in its group, 0 to N - 1.

    Raises:
        ValueError: N does not divide the processes.
    """

    def __init__(self, device: torch.device, processes: int, size: int, kind: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        if processes % size:
            raise ValueError(f"{SETTING}: got {size} in {processes} processes, want a divisor of their number")
        self.size, self.kind = size, kind
        self.index, self.member = divmod(dist.get_rank(), size)
        self.count = processes // size
        shape = (self.count, size, 1) if kind == "ring" else (self.count, 1, size)
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
        self._device = device
        self._own, self._others = self._mesh[kind].get_group(), self._mesh["data"].get_group()

    def sum(self, values: Tensor) -> None:
        """Elementwise over the members of this group, in place."""
        dist.all_reduce(values, group=self._own)

    def sum_of_groups(self, values: Tensor) -> None:
        """Elementwise over groups, whose members have equal ones, in place."""
        dist.all_reduce(values, group=self._others)

    def first(self, value: Any) -> Any:
        """The first member's object, in each."""
        found = [value]
        dist.broadcast_object_list(found, group_src=0, group=self._own)
        return found[0]

    def split(self, denoiser: nn.Module) -> None:
        """Splits the tokens of a denoiser that `check` passed, in every later call."""
        split(denoiser, self.size, self.kind, self._mesh, self._device)


def split(denoiser: nn.Module, size: int, kind: str, mesh: Any, device: torch.device) -> None:
    """Splits the tokens of a denoiser that `check` passed, in every later call.

    Args:
        denoiser: of diffusers.
        size: of a group.
        kind: "ulysses" or "ring".
        mesh: with the dimensions "ring" and "ulysses".
        device: of this process.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    _take_over_attention()
    tokens = ContextParallelConfig(mesh=mesh, **{f"{kind}_degree": size})
    config = ParallelConfig(context_parallel_config=tokens)
    # What `enable_parallelism` does, but for accelerators alone, and for text that is refined before it is split.
    config.setup(0, mesh.size(), device, mesh=mesh)
    blocks = blocks_of(denoiser)
    for module in chain.from_iterable(block.modules() for block in blocks):
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(denoiser, tokens, plan_of(denoiser))
    if type(denoiser).__name__ == "HunyuanVideoTransformer3DModel":
        for block in blocks:
            block.register_forward_pre_hook(partial(_with_mask_in_order, size), with_kwargs=True)


def _take_over_attention() -> None:
    """Puts Ulysses around diffusers' attention backends, once; without context parallelism they are as they were."""
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    backends, ring = registry._backends, attention_dispatch.TemplatedRingAttention
    if ring not in _ours:
        attention_dispatch.TemplatedRingAttention = _readable_once(ring)
        _ours.add(attention_dispatch.TemplatedRingAttention)
    for name in map(attention_dispatch.AttentionBackendName, registry._supports_context_parallel):
        if backends[name] not in _ours:
            backends[name] = _with_exchanges(backends[name])
            _ours.add(backends[name])


class _Read:
    """What a function saved, read once, as torch's checkpoints hand it out."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _readable_once(ring: Any) -> Any:
    """diffusers' ring attention, whose backward reads what it saved at every turn, for blocks that are checkpointed."""

    class Ring(ring):  # type: ignore[misc]  # diffusers has no types
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return ring.backward(_Read(ctx), *grads)

    return Ring


def _with_exchanges(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(attend)
    def attended(query: Tensor, key: Tensor, value: Tensor, _parallel_config: Any = None, **more: Any) -> Tensor:
        if _parallel_config is None:
            return attend(query, key, value, **more)
        given = query, key, value
        if torch.is_autocast_enabled(query.device.type):
            # As attention would, before they change hands; a ring's kernels know no autocast.
            query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in given)
        config = _parallel_config.context_parallel_config
        if config.ring_degree > 1:
            return attend(query, key, value, _parallel_config=_parallel_config, **more)
        size, group = config.ulysses_degree, config._ulysses_mesh.get_group()
        mask = more.get("attn_mask")
        if mask is not None and mask.shape[-1] == key.shape[1]:
            more["attn_mask"] = _gathered(mask, size, group)
        query, key, value = (_Exchange.apply(t, size, group, HEADS, TOKENS) for t in (query, key, value))
        found: Tensor = _Exchange.apply(attend(query, key, value, **more), size, group, TOKENS, HEADS)
        return found

    return attended


# Dimensions of queries, keys, values and results.
TOKENS, HEADS = 1, 2


class _Exchange(torch.autograd.Function):
    """Splits a dimension among the members of a group, and joins what each has of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: Any, split: int, joined: int) -> Tensor:
        ctx.given = size, group, joined, split
        return torch.cat(_swapped(torch.stack(x.chunk(size, split)), group).unbind(), joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        size, group, split, joined = ctx.given
        return _Exchange.forward(ctx, grad, size, group, split, joined), None, None, None, None


def _swapped(parts: Tensor, group: Any) -> Tensor:
    """Of `[N, ...]` the i-th to the i-th member, for what it has for this one."""
    found = torch.empty_like(parts)
    dist.all_to_all_single(found, parts, group=group)
    return found


def _gathered(mask: Tensor, size: int, group: Any) -> Tensor:
    """The members' masks of their own keys, `[..., S / N]`, after each other."""
    parts = [torch.empty_like(mask) for _ in range(size)]
    dist.all_gather(parts, mask.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _with_mask_in_order(
    size: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """HunyuanVideo's mask `[B, 1, 1, S]` in the order in which Ulysses puts keys."""
    names = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
    found = dict(zip(names, args, strict=False)) | kwargs
    mask = found.get("attention_mask")
    if mask is None:
        return args, kwargs
    latents, text = (found[name].shape[1] for name in names[:2])
    parts = mask.split([mask.shape[-1] * n // (latents + text) for n in (latents, text)], dim=-1)
    # Member by member, latents before text.
    ordered = torch.cat(list(chain(*zip(*(part.chunk(size, dim=-1) for part in parts), strict=True))), dim=-1)
    if len(args) > 3:
        return (*args[:3], ordered, *args[4:]), kwargs
    return args, kwargs | {"attention_mask": ordered}


def plan_of(model: Any) -> Mapping[str, Any]:
    """diffusers' plan of what is split and gathered where, or ours."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    found: Mapping[str, Any] | None = model._cp_plan
    if found is not None:
        return found
    stream = ContextParallelInput(split_dim=1, expected_dims=3)
    table = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    # HunyuanVideo's, which diffusers 0.42 has none for.
    return {
        "transformer_blocks.0": {"hidden_states": stream, "encoder_hidden_states": stream},
        "rope": {0: table, 1: table},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def check(model: nn.Module, size: int, kind: str, tokens: Mapping[str, int], text_tokens: int) -> None:
    """Raises ValueError where a denoiser or its calls cannot be split among `size` processes.

    Args:
        model: of diffusers.
        size: of a group.
        kind: "ulysses" or "ring".
        tokens: of latents, by a name of the size that has them.
        text_tokens: as the denoiser gets them.
    """
    name, found = type(model).__name__, FAMILIES.get(type(model).__name__)
    if found is None:
        why = REFUSED.get(name, "which has no plan of how tokens are split")
        raise ValueError(f"{SETTING}: got {size} for a {name}, {why}; want 1")
    config: Any = model.config
    if getattr(config, "image_condition_type", None) == "token_replace":
        raise ValueError(f"{SETTING}: got {size} for a first frame whose tokens are modulated apart, want 1")
    if kind == "ring" and found.masked:
        raise ValueError(f'{RING_SETTING}: got "ring" for a {name}, whose attention has a mask, want "ulysses"')
    heads = config.num_attention_heads
    if kind == "ulysses" and heads % size:
        raise ValueError(f"{SETTING}: got {size} for a {name} of {heads} heads, want a divisor of {heads}")
    for what, count in tokens.items():
        if count % size:
            raise ValueError(f"{SETTING}: got {size} for {what}, which is {count} tokens; want a divisor of {count}")
    if found.text and text_tokens % size:
        raise ValueError(
            f"{SETTING}: got {size} for {text_tokens} tokens of text, want a divisor of {text_tokens}, or "
            "model.max_text_tokens a multiple of it"
        )
