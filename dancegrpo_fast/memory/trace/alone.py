"""One process of several that share a sample's tokens, traced without the others."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ... import sequence


class _Mesh:
    """Of a group of `count` processes, of which this is the first."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __getitem__(self, names: object) -> "_Mesh":
        return self

    def _flatten(self) -> "_Mesh":
        return self

    def size(self) -> int:
        return self._count

    def get_local_rank(self) -> int:
        return 0

    def get_group(self) -> int:
        return self._count


def split_alone(denoiser: nn.Module, size: int, kind: str) -> None:
    """Splits the tokens as for one of `size` processes; calls have to be made inside `without_others`."""
    sequence.split(denoiser, size, kind, _Mesh(size), torch.device("cpu"))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, count: int) -> Tensor:
        ctx.dim, ctx.count = dim, count
        return _gathered(tensor, dim, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.count, dim=ctx.dim)[0], None, None


def _gathered(tensor: Tensor, gather_dim: int, group: int) -> Tensor:
    """As torch's collective allocates it: along the first dimension, and copied where that is not the one asked for."""
    found = tensor.new_empty(group * tensor.shape[0], *tensor.shape[1:])
    return found if gather_dim == 0 else torch.cat(found.chunk(group), dim=gather_dim)


def _exchanged(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(tensor)


@contextlib.contextmanager
def without_others() -> Iterator[None]:
    """Inside, what the processes of a group would exchange has its shape, and no numbers."""
    from diffusers.hooks import context_parallel
    from diffusers.models import attention_dispatch

    sharder = context_parallel.EquipartitionSharder
    collectives = SimpleNamespace(
        all_gather_tensor=_gathered,
        permute_tensor=_exchanged,
        AsyncCollectiveTensor=attention_dispatch.funcol.AsyncCollectiveTensor,
    )
    with contextlib.ExitStack() as stack:
        for where, name, stands_in in (
            (sharder, "shard", staticmethod(lambda tensor, dim, mesh: tensor.chunk(mesh.size(), dim)[0])),
            (sharder, "unshard", staticmethod(lambda x, dim, mesh: _Gathered.apply(x.contiguous(), dim, mesh.size()))),
            (attention_dispatch, "funcol", collectives),
            (sequence, "_swapped", _exchanged),
            # Masks of the others go into tensors that are there.
            (sequence, "dist", SimpleNamespace(all_gather=lambda *_, **__: None)),
        ):
            stack.enter_context(mock.patch.object(where, name, stands_in))
        yield
