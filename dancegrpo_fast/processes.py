"""Several processes: which samples are whose, what is summed between them, and how the denoiser is spread over them.

Under DDP every process holds the whole denoiser, under FSDP2 a shard of each parameter. accelerate's configuration
says which: `use_fsdp` with `fsdp_version: 2`, or neither. Its `fsdp_reshard_after_forward` and
`fsdp_transformer_layer_cls_to_wrap` hold; without the latter, the blocks that diffusers checkpoints are the units.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .sequence import SequenceGroup
from .shards import whole

T = TypeVar("T")

# What accelerate's configuration may ask for: values that ask for nothing, and what has the word in their place.
ASKED: dict[str, tuple[str, ...]] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.updates_per_rollout says when the optimiser steps"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "model.compile says what is compiled"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "a run is of one process, DDP or FSDP2"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "a run is of one process, DDP or FSDP2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "a run is of one process, DDP or FSDP2"),
}
ASKED_OF_FSDP = {
    "FSDP_SHARDING_STRATEGY": ("full_shard", "1", "fsdp_reshard_after_forward says what is split when"),
    "FSDP_AUTO_WRAP_POLICY": (
        "no_wrap",
        "transformer_based_wrap",
        "fsdp_transformer_layer_cls_to_wrap names what is split",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "model.checkpointing says what is recomputed"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", "train.offload says what waits on the host"),
    "FSDP_IGNORED_MODULES": ("", "every module is split"),
}
# How many processes a launcher says that there are: torchrun and accelerate, and those of MPI.
LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# Kept to the end of this process: DDP would end its group while it holds the interpreter, for which a thread of gloo
# may wait, for which the group's end waits: github.com/pytorch/pytorch/issues/56297.
_groups: list[Any] = []

# That processes wait for one which encodes prompts or writes a checkpoint, before they take it for dead.
PATIENCE = timedelta(hours=3)


def share(count: int, index: int, processes: int) -> range:
    """The part of `count` neighbours that process `index` has.

    Parts differ by at most one. Where the processes divide the prompts, samples of a prompt stay together.
    """
    return range(count * index // processes, count * (index + 1) // processes)


class Processes:
    """The processes of a run, of which this is one.

    Args:
        mixed_precision: "no" or "bf16": autocast of the denoiser; under FSDP2 parameters are also gathered in it.
        sequence_parallel, sequence_kind: how many share the tokens of a sample, and how (`dancegrpo_fast.sequence`).

    Attributes:
        accelerator: accelerate's.
        index, count: of this process, and how many there are.
        sequence: those that have this one's samples, too; None where none does.
        group, groups: of this process and those with its samples, and how many such groups there are.
        leads: of its group this process is the first.
        is_main: this one writes the files.
        device: of this process.
        sharded: FSDP2.
        distributed: gradients are reduced between processes, of which there may be one.

    Raises:
        ValueError: an engine of accelerate other than DDP and FSDP2, FSDP2 with parameters on the host, or on CPUs with
            a torch before 2.9; an environment that asks for what the recipe does not; more processes than accelerate
            sees; a number of processes that cannot share samples.
    """

    def __init__(self, mixed_precision: str, sequence_parallel: int = 1, sequence_kind: str = "ulysses") -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, InitProcessGroupKwargs

        _check_environment(mixed_precision)
        plugin = fsdp_plugin()
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            fsdp_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
            raise ValueError(f"accelerate: got {kind.value}, want DDP, FSDP2 or one process")
        self.distributed = kind != DistributedType.NO
        if self.distributed and dist.group.WORLD not in _groups:
            _groups.append(dist.group.WORLD)
        if plugin is not None and not self.distributed:
            raise ValueError("accelerate: got FSDP without a process group, want `accelerate launch` or torchrun")
        self.sharded = plugin is not None
        self.index: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        for name in LAUNCHED:
            if int(os.environ.get(name) or 1) > self.count:
                raise ValueError(
                    f"{name}: got {os.environ[name]} processes, of which accelerate sees {self.count}; want a GPU for "
                    "each, or ACCELERATE_USE_CPU=true"
                )
        self.is_main = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        if self.sharded and self.device.type == "cpu" and torch.__version__ < "2.9":
            # gloo added gradients where it was asked for their mean: github.com/pytorch/pytorch/issues/162338.
            raise ValueError(f"accelerate: got FSDP2 on CPUs with torch {torch.__version__}, want torch 2.9 or DDP")
        self._reshard = plugin is not None and bool(plugin.reshard_after_forward)
        self._units: Sequence[str] = (plugin and plugin.transformer_cls_names_to_wrap) or ()
        self._gather_dtype = torch.bfloat16 if mixed_precision == "bf16" else None
        self._plain: dict[nn.Module, nn.Module] = {}
        self.sequence: SequenceGroup | None = None
        self.group, self.groups, self.leads = self.index, self.count, True
        if sequence_parallel > 1:
            self.sequence = SequenceGroup(self.device, self.count, sequence_parallel, sequence_kind)
            self.group, self.groups = self.sequence.index, self.sequence.count
            self.leads = self.sequence.member == 0

    @property
    def name(self) -> str:
        """How many processes, and how they hold the weights."""
        if not self.distributed:
            return "one process"
        sequence = "" if self.sequence is None else f", {self.sequence.size} a sample by {self.sequence.kind}"
        return f"{self.count} processes ({'FSDP2' if self.sharded else 'DDP'}{sequence})"

    @property
    def wait(self) -> bool:
        """Whether work on a sample waits for other processes."""
        return self.sharded or self.sequence is not None

    def threads(self) -> int:
        """CPU threads of this process when those of its host are shared out."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, len(os.sched_getaffinity(0)) // local)

    def share(self, count: int) -> range:
        """The part of `count` samples that this process has."""
        return share(count, self.group, self.groups)

    def scored(self, places: range, whole: int) -> range:
        """Of samples that this process has, those that it decodes and scores; `whole` neighbours stay together."""
        if self.sequence is None:
            return places
        part = share(len(places) // whole, self.sequence.member, self.sequence.size)
        return places[part.start * whole : part.stop * whole]

    def scores(self, values: Tensor) -> Tensor:
        """The sum of what each process with the same samples `scored`, zero elsewhere; a copy."""
        if self.sequence is None:
            return values
        there = values.to(self.device, copy=True)
        self.sequence.sum(there)
        return there.to(values.device)

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns, or the RuntimeError it raises, in the first of the processes with the same samples."""
        if self.sequence is None:
            return work()
        found: tuple[T | None, str | None] = None, None
        failed: RuntimeError | None = None
        if self.leads:
            try:
                found = work(), None
            except RuntimeError as error:
                found, failed = (None, str(error)), error
        made, reason = self.sequence.first(found)
        if reason is not None:
            raise failed or RuntimeError(reason)
        return cast(T, made)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over the processes, those with the same samples being one; a copy on the device."""
        there = values.to(self.device, copy=True)
        if self.sequence is not None:
            self.sequence.sum_of_groups(there)
        elif self.distributed:
            dist.all_reduce(there)
        return there

    def max(self, values: Tensor) -> Tensor:
        """Elementwise over the processes; a copy on the device."""
        there = values.to(self.device, copy=True)
        if self.distributed:
            dist.all_reduce(there, dist.ReduceOp.MAX)
        return there

    def largest(self, number: int) -> int:
        """Of a number that each process has; every process has to call it."""
        return int(self.max(torch.tensor(number))) if self.distributed else number

    def collect(self, values: list[T]) -> list[T]:
        """The lists of all processes, in order, on each of them."""
        from accelerate.utils import gather_object

        found: list[T] = gather_object(values) if self.distributed else values
        return found

    def prepare(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser as rollout calls it: its tokens and, under FSDP2, weights split, in the recipe's precision.

        Under FSDP2 the main process's weights are handed out, and parameters are other objects afterwards.
        """
        if self.sharded:
            self._plain[denoiser] = _without_data(denoiser)
        if self.sequence is not None:
            self.sequence.split(denoiser)
        if self.sharded:
            self._split(denoiser)
        prepared: nn.Module = self.accelerator.prepare_model(denoiser, evaluation_mode=True)
        return prepared

    def _split(self, denoiser: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from .activations.checkpointing import blocks_of

        if self._units:
            units = [module for module in denoiser.modules() if type(module).__name__ in self._units]
        else:
            units = blocks_of(denoiser)
        if not units:
            raise ValueError(f"fsdp_transformer_layer_cls_to_wrap: got {list(self._units)}, want classes of the model")
        # Inputs keep their precision: times and rotary tables must not be rounded.
        policy = MixedPrecisionPolicy(self._gather_dtype, torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": init_device_mesh(self.device.type, (self.count,)), "mp_policy": policy}
        # One after the other: the whole is never on a device.
        for unit in units:
            self._hand_out(unit)
            fully_shard(unit, reshard_after_forward=self._reshard, **options)
        self._hand_out(denoiser)
        fully_shard(denoiser, reshard_after_forward=False, **options)

    @torch.no_grad()
    def _hand_out(self, part: nn.Module) -> None:
        """Puts the main process's weights on every device; what is split already stays."""
        from torch.distributed.tensor import DTensor

        for module in part.modules():
            for values in (module._parameters, module._buffers):
                for name, value in values.items():
                    if value is None or isinstance(value, DTensor):
                        continue
                    there = value.to(self.device) if self.is_main else torch.empty_like(value, device=self.device)
                    dist.broadcast(there, 0)
                    if value.is_meta and isinstance(value, nn.Parameter):
                        values[name] = nn.Parameter(there, value.requires_grad)
                    else:
                        value.data = there

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The prepared denoiser as the update calls it: inside DDP where gradients are reduced by that."""
        if not self.distributed or self.sharded:
            return denoiser
        # Training changes no buffers. Gradients live in the buckets, so they are not there twice. Some models compute
        # what their last block makes of the text, and use it for nothing.
        with warnings.catch_warnings():
            # New versions of torch have another name for it, old ones only this one.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                denoiser,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
            )

    @contextlib.contextmanager
    def reducing(self, denoiser: nn.Module, last: bool) -> Iterator[None]:
        """Around a forward and its backward: gradients stay with their process unless it is the last."""
        if last or not self.distributed:
            yield
        elif isinstance(denoiser, nn.parallel.DistributedDataParallel):
            with denoiser.no_sync():
                yield
        else:
            module: Any = denoiser
            module.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                module.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def sampling(self, denoiser: nn.Module, resident: bool) -> Iterator[None]:
        """Around calls without gradients; parameters are shards again afterwards, so that the optimiser sees them.

        Args:
            denoiser: as prepared.
            resident: gather each parameter once and keep it, in the precision of the forward, until the end.
        """
        if not self.sharded:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        root: Any = denoiser
        units = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]
        if resident:
            root.set_reshard_after_forward(False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(self._reshard and unit is not root, recurse=False)
                unit.reshard()

    @contextlib.contextmanager
    def whole(self, denoiser: nn.Module) -> Iterator[nn.Module | None]:
        """The denoiser in the main process, None in the others; under FSDP2 one with whole parameters on the host.

        Every process has to enter it. With LoRA layers only these have their values under FSDP2.
        """
        if not self.sharded:
            yield denoiser if self.is_main else None
            return
        frozen = {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad}
        wanted = [(n, v) for n, v in denoiser.state_dict().items() if n not in frozen]
        found = {name: self.full(value) for name, value in wanted}
        if not self.is_main:
            yield None
            return
        plain = self._plain[denoiser]
        plain.load_state_dict(found, strict=False, assign=True)
        yield plain

    def full(self, value: Tensor) -> Tensor | None:
        """A parameter or a state of one, whole, in the main process's host memory; None in the others.

        Every process has to call it for the same tensors in the same order.
        """
        found = whole(value.detach())
        return found.cpu() if self.is_main else None


def _check_environment(mixed_precision: str) -> None:
    """Raises ValueError where accelerate's variables ask for what would be left undone, or done beside the recipe."""
    asked = ASKED | (ASKED_OF_FSDP if _fsdp_asked() else {})
    # `accelerate launch` says "no" where nobody asked.
    asked["ACCELERATE_MIXED_PRECISION"] = ("no", mixed_precision, f'train.mixed_precision is "{mixed_precision}"')
    for name, (*nothing, instead) in asked.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in nothing:
            raise ValueError(f'{name}: got "{value}", want "{nothing[0]}": {instead}')


def _fsdp_asked() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded() -> bool:
    """Whether the processes of this run split the denoiser (FSDP2)."""
    return _fsdp_asked() and dist.is_available() and dist.is_initialized()


def fsdp_plugin() -> Any:
    """accelerate's FSDP settings where its configuration asks for FSDP, checked; or None.

    On the CPU accelerate itself leaves them out.
    """
    if not _fsdp_asked():
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    # Models of rewards are whole in every process.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: got {plugin.fsdp_version} in accelerate's configuration, want 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params: got true in accelerate's configuration, want false")
    return plugin


def _without_data(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device."""
    memo: dict[int, Tensor] = {}
    for value in chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(module, memo)
