"""One of two gloo processes that share the tokens of tiny transformers. Started by test_sequence.py.

Usage: sequence_worker.py RANK STORE OUTPUT CASE..., such as "ulysses flux" and "ring wan".
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from dancegrpo_fast.memory.trace.result import Trace

WORLD = 2
# Text of eight tokens, of which masks hide some of every second sample's.
CASES: dict[str, dict[str, Any]] = {
    "flux": {},
    "hunyuan": {},
    "skyreels": {"in_channels": 32},
    "qwen": {"num_attention_heads": 4},
    "qwen two conditions": {"num_attention_heads": 4, "zero_cond_t": True},
    "wan": {},
    "wan image": {"image_dim": 20, "added_kv_proj_dim": 24, "cross_attn_norm": False},
    "wan per token": {},
}
RING = ("flux", "wan")


def even(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """With one token of text more where blocks split it."""
    if name.startswith("wan"):
        return inputs
    more = dict(inputs)
    for key in ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask"):
        if key in inputs:
            more[key] = torch.cat([inputs[key], inputs[key][:, -1:]], dim=1)
    if "txt_ids" in inputs:
        more["txt_ids"] = torch.cat([inputs["txt_ids"], inputs["txt_ids"][-1:]])
    return more


def trained(model: nn.Module, inputs: dict[str, Any], summed: bool) -> dict[str, Tensor]:
    """The output, and every gradient; `summed` over the processes."""
    out = model(**inputs, return_dict=False)[0]
    out.square().mean().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for grad in found.values() if summed else ():
        dist.all_reduce(grad)
    return {"output": out.detach()} | found


def books(found: "Trace") -> dict[str, int]:
    """Bytes of the peak, of the backward's, and of what the forward keeps."""
    backward, saved = found.peak_of("backward").bytes, sum(found.saved_by_group.values())
    return {"peak": found.peak.bytes, "backward": backward, "saved": saved}


def ring_on_a_cpu() -> torch.library.Library:
    """CUDA's flash attention by the CPU's, for a ring needs the log-sum-exp, which no backend gives on a CPU."""
    library = torch.library.Library("aten", "IMPL")
    ops = torch.ops.aten

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, scale=scale)
        none = torch.empty(0)
        return out, lse, none, none, query.shape[2], key.shape[2], none, none, none

    def backward(grad_out: Tensor, *given: Any, scale: float | None = None) -> tuple[Tensor, ...]:
        query, key, value, out, lse, *_ = given
        found: tuple[Tensor, ...] = ops._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, False, scale=scale
        )
        return found

    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    return library


def main(rank: int, store: str, output: str, *cases: str) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[1]))
    from dancegrpo_fast import accelerate
    from dancegrpo_fast.activations.checkpointing import apply
    from dancegrpo_fast.memory.trace.alone import split_alone, without_others
    from dancegrpo_fast.memory.trace.tracer import collected, measure, trace
    from dancegrpo_fast.sequence import SequenceGroup, check
    from tests.patch.models import TINY, Tiny

    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(store, WORLD))
    groups = {kind: SequenceGroup(torch.device("cpu"), WORLD, WORLD, kind) for kind in ("ulysses", "ring")}
    library = ring_on_a_cpu()
    found: dict[str, Any] = {}
    for kind, _, name in (case.partition(" ") for case in cases):
        tiny = Tiny(TINY[name].build, TINY[name].draw, CASES[name])
        # A ring joins results in float32 whatever they are.
        dtype = torch.float32 if kind == "ring" else torch.float64
        inputs = even(name, tiny.inputs(dtype))

        def split(
            change: Any = None,
            by: Any = groups[kind].split,
            ring: bool = kind == "ring",
            tiny: Any = tiny,
            dtype: Any = dtype,
        ) -> Any:
            model = tiny.model(dtype)
            if ring:
                model.set_attention_backend("_native_flash")
            if change is not None:
                change(model)
            check(model, WORLD, "ring" if ring else "ulysses", {}, 8)
            by(model)
            return model

        found[f"{kind} {name}"] = trained(tiny.model(dtype), inputs, False), trained(split(), inputs, True)
        # Block ops are lossless in the dtypes that models are trained in.
        inputs = even(name, tiny.inputs())
        split = partial(split, dtype=torch.float32)
        plain = trained(split(), inputs, False)
        same = {}
        for policy in ("full", "attention"):
            model = split()
            apply(model, policy)
            same[policy] = trained(model, inputs, False)
        same["block ops"] = trained(split(lambda model: accelerate(model, "lossless", recompute="all")), inputs, False)
        found[f"{kind} {name}, the same bits"] = plain, same
        if kind == "ring":
            # Of the kernel that stands in, the bytes are others.
            continue
        given = inputs | {"return_dict": False}
        with collected(), without_others():
            predicted = books(trace(split(by=partial(split_alone, size=WORLD, kind=kind)), given, attention="cpu"))
        # The thread of a collective may hold its tensor a moment longer, which only ever adds: the least of several.
        with collected():
            measured = [books(measure(split(), given)) for _ in range(6)]
        found[f"{kind} {name}, bytes"] = predicted, {key: min(m[key] for m in measured) for key in predicted}
    del library
    torch.save(found, f"{output}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
