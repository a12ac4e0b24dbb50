"""Counts what torch.compile's graphs move and save: AOTAutograd, Inductor's passes and scheduler, but no kernel.

Saved are the results of the forward graph beyond the block's own, as the min-cut partitioner chose them. Traffic is
that of the fused kernels which Inductor's scheduler makes for CUDA, each buffer read or written once (its own byte
count), without matrix products and attention. No GPU is needed for it: one is described to Inductor (an H100), the
graphs are traced on fake CPU tensors and lowered for fake CUDA ones.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._inductor import compile_fx, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import reinplace
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.func import functional_call
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from dancegrpo_fast.memory.trace.fake import CudaOperators

from .configurations import Configuration
from .count import Counts, Tally, is_compute, token_dimensions

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


@contextlib.contextmanager
def _described_gpu() -> Iterator[None]:
    """Inductor asks for a device's properties, and here gets them without one."""
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", True),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "get_device_properties", PROPERTIES),
        (torch.cuda, "get_device_capability", CAPABILITY),
        (CudaInterface, "is_available", True),
        (CudaInterface, "get_device_properties", PROPERTIES),
        (CudaInterface, "get_compute_capability", 10 * CAPABILITY[0] + CAPABILITY[1]),
        (CudaInterface.Worker, "current_device", 0),
        (CudaInterface.Worker, "get_device_properties", PROPERTIES),
        (scheduler, "has_triton", True),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            given = mock.Mock(return_value=answer)
            stack.enter_context(
                mock.patch.object(owner, name, staticmethod(given) if owner is not torch.cuda else given)
            )
        # Copies between fake CUDA tensors need a build with CUDA; only the result's shape is wanted.
        stack.enter_context(mock.patch.object(reinplace, "_inplace_generalized_scatter", lambda out, *rest: out))
        yield


def _extern_name(node: Any) -> str | None:
    """The operator that an extern kernel calls; None for views and parts of another's results."""
    operator = getattr(node.node, "op_overload", None)
    if operator is None or operator.is_view:
        return None
    return str(operator._schema.name.split("::")[1])


def _tally(graph: GraphLowering) -> Tally:
    tally = Tally()
    for node in graph.scheduler.nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        name: str | None = "fused"
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            name = _extern_name(node)
            if name is None:
                continue
            if is_compute(name):
                tally.compute += 1
                if "attention" not in name:
                    tally.products += node.get_read_write_buffers_sizes()
                continue
        tally.traffic[f"inductor.{name}"] += node.get_read_write_buffers_sizes()
        tally.calls[f"inductor.{name}"] += 1
    return tally


def _lowered(graph_module: Any, inputs: list[Any], backward: bool) -> Tally:
    """Inductor's way with one graph, up to its scheduler, for CUDA."""

    def placed(value: Any) -> Any:
        return DEVICE if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, placed), map_aggregate(node.kwargs, placed)
    with torch.no_grad():
        inputs = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE) if isinstance(t, Tensor) else t
            for t in inputs
        ]
    with _described_gpu(), V.set_debug_handler(DebugContext()):
        view_to_reshape(graph_module)
        with torch.no_grad():
            fake_mode = compile_fx.fake_tensor_prop(graph_module, inputs)
        with V.set_fake_mode(fake_mode):
            compile_fx._recursive_post_grad_passes(graph_module, is_inference=False)
            graph = GraphLowering(
                graph_module, example_inputs=inputs, graph_id=0, is_backward=backward, is_inference=False
            )
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*inputs)
                graph.init_wrapper_code()
                graph._update_scheduler()
                return _tally(graph)


def _saved(graph_module: Any, results: int, tokens: set[int]) -> list[Tensor]:
    """One tensor a storage of the forward graph's results beyond the block's, without its inputs."""
    nodes = list(graph_module.graph.nodes)
    returned = nodes[-1].args[0]
    # Two parts of one result come with it: it belongs to the block's results.
    known = [n.meta.get("val") for n in (*(n for n in nodes if n.op == "placeholder"), *returned[:results])]
    seen = {t.untyped_storage()._cdata for t in known if isinstance(t, Tensor)}
    found = []
    for node in returned[results:]:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor) or not tokens & set(tensor.shape):
            continue
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            found.append(tensor)
    return found


def count_compiled(configuration: Configuration, frozen: bool = False, lora: int = 0) -> Counts:
    """As `count`, for a block compiled by itself; inside a FakeTensorMode."""
    setup = configuration.make(frozen, lora)
    parameters: dict[str, Tensor] = dict(setup.block.named_parameters())
    graphs: dict[str, tuple[Any, list[Any]]] = {}

    def keep(name: str) -> Any:
        def compiler(graph_module: Any, inputs: list[Any]) -> Any:
            graphs[name] = graph_module, inputs
            return make_boxed_func(graph_module.forward)

        return compiler

    # Anything but tensors is a constant of the graph.
    tensors = {name: value for name, value in setup.arguments.items() if isinstance(value, (Tensor, tuple))}

    def called(parameters: dict[str, Tensor], tensors: dict[str, Any]) -> Any:
        return functional_call(setup.block, parameters, (), setup.arguments | tensors)

    compiled = aot_function(
        called,
        keep("forward"),
        keep("backward"),
        partition_fn=compile_fx.partition_fn,
        decompositions=select_decomp_table(),
    )
    with CudaOperators(fused_norm=False):
        outputs = [t for t in tree_leaves(compiled(parameters, tensors)) if t is not None]
    kept = _saved(graphs["forward"][0], len(outputs), token_dimensions(configuration))
    total = sum(t.untyped_storage().nbytes() for t in kept)
    asked = [*setup.asked, *(p for p in parameters.values() if p.requires_grad)]
    # The backward's graph is made when it is first run.
    torch.autograd.grad(outputs, asked, [torch.empty_like(t) for t in outputs])
    forward = _lowered(*graphs["forward"], backward=False)
    backward = _lowered(*graphs["backward"], backward=True)
    return Counts(forward, backward, total, [(tuple(t.shape), t.dtype) for t in kept])
