"""Block swap: frozen weights of some blocks wait in host memory and stream to the device when their block runs."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._pytree import tree_leaves

from .checkpointing import blocks_of, is_compiled

# On the device, each for the weights of one block: one block runs while the next one's arrive.
BUFFERS = 2
# Bytes between the starts of tensors in a buffer, as CUDA's allocator has it.
ALIGNMENT = 256


def streamed_blocks(blocks: int, blocks_to_swap: int) -> list[int]:
    """Which of a model's blocks stream: `blocks_to_swap` and one for each buffer, spread evenly.

    Of equal blocks the device holds `blocks_to_swap` less than the model has. As much work as can be lies between two
    that stream, in which the second one's weights arrive.

    Raises:
        ValueError: none, or more than the buffers leave.
    """
    most = blocks - BUFFERS
    if isinstance(blocks_to_swap, bool) or not isinstance(blocks_to_swap, int) or not 1 <= blocks_to_swap <= most:
        raise ValueError(f"blocks_to_swap: got {blocks_to_swap}, want 1 to {most}, {BUFFERS} less than there are")
    count = blocks_to_swap + BUFFERS
    return [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


def packed(sizes: list[int]) -> tuple[list[int], int]:
    """Where tensors of so many bytes begin in one piece of memory, and its size."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


class _Place(NamedTuple):
    """Where a tensor is in a block's buffer, and how to put another one in its stead."""

    put: Callable[[Tensor], None]
    start: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def within(self, flat: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return flat[self.start : self.start + size].view(self.dtype).as_strided(self.shape, self.stride)


class Streamed:
    """A block, its frozen weights in one piece of host memory, and its turn."""

    def __init__(self, block: nn.Module, turn: int, pinned: bool) -> None:
        self.block, self.turn = block, turn
        self._parameters = list(_frozen(block))
        parts = [part for module, _, parameter in self._parameters for part in _parts(module, parameter)]
        starts, size = packed([tensor.nbytes for tensor, _ in parts])
        self.places = [
            _Place(put, start, tensor.shape, torch.empty_like(tensor, device="meta").stride(), tensor.dtype)
            for (tensor, put), start in zip(parts, starts, strict=True)
        ]
        self.host = torch.empty(size, dtype=torch.uint8)
        if pinned:
            _pin(self.host)
        for place, (tensor, _) in zip(self.places, parts, strict=True):
            place.within(self.host).copy_(tensor)
        self.point(self.host)

    def point(self, flat: Tensor) -> None:
        """Makes the weights the parts of a buffer, whatever that holds."""
        for place in self.places:
            place.put(place.within(flat))

    def strayed(self, flat: Tensor) -> bool:
        """Whether a weight is another tensor than the part of this buffer."""
        start = flat.untyped_storage().data_ptr()
        return any(parameter.untyped_storage().data_ptr() != start for *_, parameter in self._parameters)

    @contextmanager
    def without(self) -> Iterator[None]:
        """The block has none of these weights inside."""
        for module, name, _ in self._parameters:
            module._parameters[name] = None
        try:
            yield
        finally:
            for module, name, parameter in self._parameters:
                module._parameters[name] = parameter


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad and parameter.numel():
                yield module, name, parameter


def _parts(module: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """What travels of a parameter: its data, and the scales of bitsandbytes' nf4."""
    yield parameter.data, partial(_put, module, parameter)
    if (state := getattr(parameter, "quant_state", None)) is not None:
        yield state.absmax, partial(_put_scales, state)


def _put(module: nn.Module, parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value
    # bitsandbytes' int8 calls the same weights CB as well, here or there, and has small scales beside them.
    for holder in (parameter, getattr(module, "state", None)):
        if getattr(holder, "CB", None) is not None:
            holder.CB = value  # type: ignore[union-attr]  # not None
        if getattr(holder, "SCB", None) is not None:
            holder.SCB = holder.SCB.to(value.device)  # type: ignore[union-attr]  # not None


def _put_scales(state: Any, value: Tensor) -> None:
    state.to(value.device)
    state.absmax = value


def _pin(flat: Tensor) -> None:
    """Page-locks host memory as it is, where torch's own allocator would take the next power of two."""
    cudart: Any = torch.cuda.cudart()
    if code := int(cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, 1)):
        raise RuntimeError(
            f"blocks_to_swap: got error {code} from CUDA for {flat.nbytes} bytes more of page-locked host memory, want "
            "fewer blocks, or a host that lets more be locked"
        )
    weakref.finalize(flat, cudart.cudaHostUnregister, flat.data_ptr()).atexit = False


class _Buffer:
    """Device memory for the weights of one block at a time.

    Attributes:
        holds: whose weights are there or on their way.
        arrives: when they are there; None where nobody has to wait.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: Streamed | None = None
        self.arrives: torch.cuda.Event | None = None


class BlockSwap:
    """Streams frozen weights of some blocks, in the order in which the model runs them and back.

    The weights of a block are the same part of the same buffer at all times, whatever that holds. So whoever keeps
    them for the backward, the graph or a quantised layer, may do so: they are brought again before it begins, in
    blocks that are checkpointed and in those that are not. Weights are only ever copied to the device.

    On a GPU the host memory is page-locked, and a side stream brings the next block's weights while one runs; on the
    CPU they are copied at once. State dicts hold the weights in host memory, and what is loaded goes there; a model
    that is moved to the host has its weights there and no buffers.

    Attributes:
        device: of the model.
        streamed: the blocks.
    """

    def __init__(self, model: nn.Module, blocks_to_swap: int, device: torch.device) -> None:
        """Moves the model to the device, but for what waits.

        Args:
            model: a diffusers transformer or UNet, with frozen weights and LoRA layers, on the host or the device.
            blocks_to_swap: as many blocks and one more for each buffer stream.
            device: where it runs.

        Raises:
            ValueError: more blocks than can be, blocks that are compiled, or weights that are trained.
        """
        blocks = blocks_of(model)
        chosen = [blocks[i] for i in streamed_blocks(len(blocks), blocks_to_swap)]
        for block in chosen:
            if is_compiled(block):
                raise ValueError(f"blocks_to_swap: got {blocks_to_swap} with compiled blocks, want plain ones, or 0")
            if not any(True for _ in _frozen(block)):
                raise ValueError(f"blocks_to_swap: got {blocks_to_swap} with all weights trained, want LoRA, or 0")
        self.device = torch.device("cpu")
        self._side: torch.cuda.Stream | None = None
        self._buffers: list[_Buffer] = []
        self.streamed = [Streamed(block, turn, device.type == "cuda") for turn, block in enumerate(chosen)]
        for streamed in self.streamed:
            self._hook(streamed)
        self._enter(device)
        model.to(device)

    def _hook(self, streamed: Streamed) -> None:
        block: Any = streamed.block
        block.register_forward_pre_hook(partial(self._before, streamed), prepend=True)
        block.register_forward_hook(partial(self._after, streamed), with_kwargs=True, always_call=True)
        block.register_state_dict_pre_hook(lambda *_: streamed.point(streamed.host))
        block.register_state_dict_post_hook(lambda *_: self._back(streamed))
        block.register_load_state_dict_pre_hook(lambda *_: streamed.point(streamed.host))
        block.register_load_state_dict_post_hook(lambda *_: self._back(streamed))
        block._apply = partial(self._apply, streamed, block._apply)

    def _buffer(self, streamed: Streamed) -> _Buffer:
        return self._buffers[streamed.turn % BUFFERS]

    # Where the weights are.

    def _enter(self, device: torch.device) -> None:
        # With its index, as tensors there have it.
        device = self.device = torch.empty(0, device=device).device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = max(streamed.host.nbytes for streamed in self.streamed)
        self._buffers = [_Buffer(size, device) for _ in range(BUFFERS)]
        for streamed in self.streamed:
            streamed.point(self._buffer(streamed).flat)

    def _leave(self) -> None:
        if self._side is not None:
            # Nothing may arrive in memory that is given back.
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._buffers, self._side, self.device = [], None, torch.device("cpu")
        for streamed in self.streamed:
            streamed.point(streamed.host)

    def _back(self, streamed: Streamed) -> None:
        """After a state dict, through which the host's weights may change."""
        if self._buffers:
            self._buffer(streamed).holds = None
            streamed.point(self._buffer(streamed).flat)

    def _apply(
        self, streamed: Streamed, original: Callable[..., Any], fn: Callable[[Tensor], Tensor], *args: Any
    ) -> nn.Module:
        """In place of a block's, by which torch moves modules: all that streams moves with the first block."""
        dtypes = {place.dtype for place in streamed.places}
        found = [fn(torch.empty(0, dtype=dtype, device=self.device)) for dtype in dtypes]
        if {one.dtype for one in found} != dtypes:
            raise ValueError(f"blocks_to_swap: got another dtype for {dtypes} that stream, want it set before")
        with streamed.without():
            original(fn, *args)
        if (device := found[0].device) != self.device:
            self._leave()
            if device.type != "cpu":
                self._enter(device)
        return streamed.block

    # Around a block's work.

    def _is_idle(self) -> bool:
        """On the host weights are where they are; and on fake tensors nothing would really be copied."""
        return not self._buffers or active_fake_mode() is not None

    def _before(self, streamed: Streamed, *_: Any) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("blocks_to_swap: got a model inside torch.compile, want it as it is, or 0")
        if self._is_idle():
            return
        self._use(streamed, streamed.turn + (-1 if _in_backward() else 1))

    def _after(self, streamed: Streamed, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._is_idle():
            return
        flat = self._buffer(streamed).flat
        if streamed.strayed(flat):
            # Layerwise casting leaves copies of them.
            streamed.point(flat)
        if _in_backward():
            return
        if not torch.is_grad_enabled():
            if streamed is self.streamed[-1]:
                # For the next call. With gradients its own backward comes next.
                self._bring(self.streamed[0])
            return
        given = {id(value) for value in tree_leaves((args, kwargs))}
        for value in tree_leaves(output):
            # What is only handed on is computed, and backward, elsewhere.
            if isinstance(value, Tensor) and value.requires_grad and id(value) not in given:
                value.register_hook(partial(self._again, streamed))

    def _again(self, streamed: Streamed, _: Tensor) -> None:
        """Before a block's backward: those of all later ones are on their way."""
        if not self._is_idle():
            self._use(streamed, streamed.turn - 1)

    def _use(self, streamed: Streamed, following: int) -> None:
        """Has a block's weights there, and starts to bring those of the one that follows, if one does."""
        self._bring(streamed)
        buffer = self._buffer(streamed)
        if buffer.arrives is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.arrives)
            buffer.arrives = None
        if 0 <= following < len(self.streamed):
            self._bring(self.streamed[following])

    def _bring(self, streamed: Streamed) -> None:
        buffer = self._buffer(streamed)
        if buffer.holds is streamed:
            return
        buffer.holds = streamed
        there = buffer.flat[: streamed.host.nbytes]
        if self._side is None:
            there.copy_(streamed.host)
            return
        # Whose weights were there has done its work, as the main stream has it.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            there.copy_(streamed.host, non_blocking=True)
            buffer.arrives = self._side.record_event()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
