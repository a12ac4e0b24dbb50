"""A run of Flow-Factory in the planner's words."""

from typing import Any

import torch
from torch import Tensor, nn

from ..memory.planning.rewards import Reward
from ..memory.planning.settings import GIB, Settings
from ..models.setup import processes


def settings_of(
    adapter: Any,
    part: str,
    model: nn.Module,
    *,
    memory_gib: float | None = None,
    model_name: str | None = None,
    frames: int | None = None,
) -> Settings:
    """What one process has of the run.

    Args:
        adapter: Flow-Factory's, with its configuration.
        part: the transformer's name in it.
        model: the transformer.
        memory_gib: of the device; default what it has.
        model_name: as the planner knows it; default Flow-Factory's `model_name_or_path`.
        frames: of a video; default Flow-Factory's `num_frames`, or 1.

    Raises:
        ValueError: a device whose memory is not said, or settings that contradict.
    """
    train, given, device = adapter.training_args, adapter.model_args, adapter.accelerator.device
    if memory_gib is None:
        if device.type != "cuda":
            raise ValueError(f'policy: got "auto" on {device}, want memory_gib, or a policy by name')
        memory_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    shards, strategy = processes()
    targets = adapter.target_module_map.get(part)
    has_lora = given.finetune_type == "lora" and bool(targets)
    if has_lora and isinstance(targets, str):
        raise ValueError(f'policy: got "auto" with target_modules "{targets}" under LoRA, want the modules by name')
    wide = any(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    found = Settings(
        model_name or given.model_name_or_path,
        frames if frames is not None else getattr(train, "num_frames", 1),
        train.height,
        train.width,
        group_size=train.per_device_batch_size * train.num_batches_per_epoch,
        micro_batch=train.per_device_batch_size,
        rollout_batch=train.per_device_batch_size,
        num_steps=train.num_inference_steps,
        timestep_fraction=min(1.0, adapter.scheduler.num_sde_steps / train.num_inference_steps),
        guidance_scale=train.guidance_scale,
        dtype="float32" if wide and not has_lora else "bfloat16",
        mixed_precision="bf16" if wide and not has_lora else "no",
        lora=given.lora_rank if has_lora else 0,
        target_modules=tuple(sorted(targets)) if has_lora else (),
        lora_dtype="float32" if wide else "bfloat16",
        # As torch's own SDPA keeps it.
        attention="flash",
        device=str(device),
        fsdp=shards,
        strategy=strategy,
        text_encoders="precomputed",
        gpu_gib=memory_gib,
    )
    return found.changed(others=_resting(device, model))


def _resting(device: torch.device, model: nn.Module) -> tuple[Reward, ...]:
    """What lies on the device already beside the model: reward models, moving averages, the VAE.

    The planner counts the VAE, too: that much is kept free twice.
    """
    if device.type != "cuda":
        return ()
    own = sum(_local(p).nbytes for p in model.parameters() if p.device.type == "cuda")
    return (
        Reward("what rests on the device", max(0, torch.cuda.memory_allocated(device) - own), "memory_allocated", 1),
    )


def _local(parameter: Any) -> Tensor:
    """This rank's shard."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local
