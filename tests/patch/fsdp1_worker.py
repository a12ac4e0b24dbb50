"""One of two gloo processes: FSDP1 around each block, as DanceGRPO and its kin wrap. Started by test_parallel.py.

Usage: fsdp1_worker.py RANK STORE OUTPUT
"""

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

WORLD, STEPS, DECAY = 2, 2, 0.9
F32, BF16 = torch.float32, torch.bfloat16
Group = dist.ProcessGroup
# Family; dtype of the units; whether the optimiser sees the original parameters; LoRA, whose layers are units, too.
CASES = {
    "float32": ("flux", F32, False, False),
    "original parameters": ("flux", BF16, True, False),
    "lora": ("flux", F32, False, True),
    "hunyuan": ("hunyuan", F32, False, False),
}


def lora(model: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["to_q", "ff.net.2", "proj_mlp", "proj_out"], init_lora_weights=False)
    model.add_adapter(config)


def wrapped(model: nn.Module, blocks: set[type[nn.Module]], case: str, group: Group) -> FullyShardedDataParallel:
    """The model with a unit for each block, each of them checkpointed."""
    _, dtype, originals, with_lora = CASES[case]
    policy: Callable[..., Any] = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    if with_lora:
        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(model)
    mixed = MixedPrecision(param_dtype=dtype, reduce_dtype=dtype, buffer_dtype=dtype, cast_forward_inputs=False)
    unit = FullyShardedDataParallel(
        model,
        process_group=group,
        auto_wrap_policy=policy,
        mixed_precision=mixed,
        use_orig_params=originals,
        device_id=torch.device("cpu"),
    )
    apply_activation_checkpointing(unit, checkpoint_wrapper, check_fn=lambda module: type(module) in blocks)
    return unit


def trained(case: str, accelerated: bool, group: Group) -> dict[str, Tensor]:
    """Outputs and the rank's gradients of some steps, and the output of the averaged copy."""
    from dancegrpo_fast import accelerate
    from tests.patch.models import TINY

    name, dtype, _, with_lora = CASES[case]
    model, inputs = TINY[name].model(), TINY[name].inputs(dtype)
    if accelerated:
        accelerate(model, "lossless", recompute="all")
    if with_lora:
        model.requires_grad_(False)
        lora(model)
    blocks = {type(model.transformer_blocks[0]), type(model.single_transformer_blocks[0])}
    average = wrapped(copy.deepcopy(model), blocks, case, group)
    unit = wrapped(model, blocks, case, group)
    optimizer = torch.optim.SGD([p for p in unit.parameters() if p.requires_grad], lr=0.01)
    found = {}
    for step in range(STEPS):
        with torch.no_grad():
            found[f"{step}.rollout"] = unit(**inputs, return_dict=False)[0]
        out = unit(**inputs, return_dict=False)[0]
        out.float().square().mean().backward()
        found[f"{step}.output"] = out.detach()
        found |= {f"{step}.{key}": p.grad.clone() for key, p in unit.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), unit.parameters(), strict=True):
                mean.lerp_(new, 1 - DECAY)
            found[f"{step}.average"] = average(**inputs, return_dict=False)[0]
    return found


def refusal(group: Group) -> str:
    """What is said where norms are units of their own, whose weights are gone between their calls."""
    from dancegrpo_fast import accelerate
    from tests.patch.models import TINY

    model = TINY["flux"].model()
    accelerate(model)
    unit = wrapped(model, {type(model.transformer_blocks[0]), nn.RMSNorm}, "float32", group)
    try:
        unit(**TINY["flux"].inputs(), return_dict=False)
    except ValueError as error:
        return str(error)
    return ""


def main(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[2]))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(store, WORLD))
    both = dist.group.WORLD
    alone = [dist.new_group([each]) for each in range(WORLD)][rank]
    runs = [(case, both) for case in CASES] + [("float32", alone)]
    found: dict[str, Any] = {
        f"{case}, {group.size()}": [trained(case, accelerated, group) for accelerated in (False, True)]
        for case, group in runs
    }
    torch.save(found | {"refusal": refusal(both)}, f"{output}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
