"""A recipe in the planner's words: before anything is loaded, and in the trainer, which knows more."""

from dataclasses import replace
from typing import Any

from ..memory.planning.cards import CARDS, USUAL
from ..memory.planning.measured import at_hand
from ..memory.planning.rewards import REWARD_MODELS, REWARDS, Reward
from ..memory.planning.settings import Settings
from ..optimizers import ADAMW, EIGHT_BIT, probe
from ..recipe import LoraSettings, Recipe, RewardSettings, TrainSettings
from .family import reference_size

ADAMW_BYTES = 8  # two float32 states


def settings_of(
    recipe: Recipe,
    *,
    model: str | None = None,
    processes: int = 1,
    strategy: str = "none",
    text_tokens: int | None = None,
    text_encoders: str = "freed",
    device: str = "cuda:sm90",
    gpu_gib: float | None = None,
) -> Settings:
    """What one process has of a run.

    Args:
        recipe: the run.
        model: what is planned for, if not `recipe.model.denoiser` or `recipe.model.path`.
        processes: that share the samples, or those of `train.sequence_parallel` of them.
        strategy: how they share the weights: "full_shard", "shard_grad_op" or "none".
        text_tokens: of a prompt; None: `model.max_text_tokens`, or as the model's pipeline pads it.
        text_encoders: as in `Settings`.
        device: that attention is chosen for; one of this machine that `rates` measured is planned at that speed.
        gpu_gib: capacity; None: `model.memory_gib`, or that of an 80 GB card.

    Raises:
        ValueError: settings that contradict, or an unknown family.
    """
    given, sampler, train = recipe.model, recipe.sampler, recipe.train
    shards = processes if strategy != "none" else 1
    groups = max(1, processes // train.sequence_parallel)
    samples = -(-train.prompts_per_iteration * train.group_size // groups)
    reference_height, reference_width = reference_size(given, sampler)
    settings = Settings(
        model or given.denoiser or given.path,
        sampler.frames,
        sampler.height,
        sampler.width,
        # Of all prompts together; a call has as many rows whatever there is to compute.
        group_size=max(samples, train.micro_batch),
        micro_batch=train.micro_batch,
        rollout_batch=train.micro_batch,
        num_steps=sampler.num_steps,
        timestep_fraction=train.timestep_fraction,
        passes=str(train.passes),
        trained_share=1.0 if train.best_of_n is None else 2 * train.best_of_n / train.group_size,
        guidance_scale=sampler.guidance_scale,
        text_tokens=text_tokens or given.max_text_tokens,
        dtype=given.dtype,
        master_dtype=train.master_dtype or "none",
        # What computes in float32 throughout asks for decodes only.
        mixed_precision="bf16" if given.dtype == "float32" else train.mixed_precision,
        lora=given.lora.rank if given.lora else 0,
        target_modules=tuple((given.lora or LoraSettings()).target_modules),
        quantization=given.quantization or "none",
        blocks_to_swap=given.blocks_to_swap,
        checkpointing=given.checkpointing,
        # As torch's own SDPA keeps it.
        attention=given.attention or "flash",
        device=device,
        block_ops=given.block_ops,
        fsdp=processes,
        strategy=strategy,
        rollout_replica=train.rollout_replica and shards > 1,
        gradient_sync=train.gradient_sync,
        sequence_parallel=train.sequence_parallel,
        sequence_kind=train.sequence_kind,
        offload=tuple(train.offload),
        vae_tiling=given.vae_tiling,
        vae_tile=given.vae_tile,
        frozen_dtype=given.frozen_dtype or given.dtype,
        **_evaluation(recipe),
        **_optimizer(train),
        rewards=_rewards(recipe),
        text_encoders=text_encoders,
        text_encoder_quantization=given.text_encoder_quantization or "none",
        kl_reference=train.kl_weight > 0,
        ema=train.ema_decay is not None,
        second_expert=given.second_expert or "trained",
        reference_height=reference_height,
        reference_width=reference_width,
        gpu_gib=gpu_gib or given.memory_gib or CARDS[USUAL].gib,
    )
    # Several processes choose alike, wherever they run.
    return at_hand(settings, device) if processes == 1 else settings


def _evaluation(recipe: Recipe) -> dict[str, Any]:
    """Sizes and guidance of its samples."""
    if recipe.evaluation is None:
        return {}
    there = recipe.evaluation.sampling(recipe.sampler)
    return {f"evaluation_{name}": getattr(there, name) for name in ("height", "width", "guidance_scale")}


def uncounted(recipe: Recipe) -> list[str]:
    """Names of rewards whose models, if they have any, are in no plan."""
    return sorted({reward.name for reward in _scored(recipe)} - REWARD_MODELS.keys())


def left_out(recipe: Recipe) -> list[str]:
    """What of a recipe is in no plan, in words."""
    names, what = uncounted(recipe), recipe.model.compile
    found = [f"models of the rewards {', '.join(names)}, if they have any"] if names else []
    if what is not None:
        found.append(f'model.compile "{what}": bytes and seconds are those of the model that is not compiled')
    return found


def _optimizer(train: TrainSettings) -> dict[str, Any]:
    """In the planner's words; what it does not know is tried on a small tensor."""
    if train.optimizer == EIGHT_BIT:
        return {"optimizer": "adamw8bit"}
    kept = probe(train).bytes_per_number
    if train.optimizer == ADAMW and kept == ADAMW_BYTES:
        return {"optimizer": "adamw_foreach" if train.optimizer_args.get("foreach") else "adamw"}
    return {"optimizer": "other", "state_bytes": kept}


def _scored(recipe: Recipe) -> list[RewardSettings]:
    return [*recipe.rewards, *(recipe.evaluation.rewards if recipe.evaluation else [])]


def _rewards(recipe: Recipe) -> tuple[Reward, ...]:
    """Rewards of one model share it."""
    found: dict[str, Reward] = {}
    for reward in _scored(recipe):
        if reward.name in REWARD_MODELS:
            name = REWARD_MODELS[reward.name]
            if name == "clip_score" and "ViT-H-14" in str(reward.args.get("path")):
                name = "clip_score_h"
            found[name] = REWARDS[name]
            if "dtype" in reward.args:
                width = 4 if reward.args["dtype"] == "float32" else 2
                found[name] = replace(found[name], bytes_per_parameter=width)
    return tuple(found.values())
