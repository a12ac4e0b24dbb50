"""Puts into a loaded model what a recipe says of its memory and speed: one function for each setting."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ..activations import checkpointing
from ..allocator import expands
from ..memory.planning.margins import with_margins
from ..memory.planning.settings import GIB, Settings
from ..memory.trace.tracer import collected
from ..patch import accelerate
from ..prompts import Prompt
from ..quantization import store_in_fp8
from ..recipe import Recipe
from .base import DiffusersModel
from .planning import settings_of

if TYPE_CHECKING:
    from ..memory.planning.planner import Iteration

# Whose longest attention has the text's tokens beside the latents'.
JOINT = (
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
)


def prepare(
    model: DiffusersModel, recipe: Recipe, device: torch.device, prompts: Sequence[Prompt], *, training: bool
) -> None:
    """Stores frozen weights in float8, puts in block ops and attention, chooses what is recomputed and tiled.

    Args:
        model: as its family loads it.
        recipe: the run; `recipe.model` has the settings, the rest says how large calls are.
        device: of the model.
        prompts: that were encoded, at least one; the first shows how long text is.
        training: whether a backward follows.

    Raises:
        ValueError: a setting that this model or device cannot have, or a replay that does not fit the memory.
    """
    settings = recipe.model
    if settings.quantization == "fp8":
        # After LoRA was added, whose layers stay as they are.
        store_in_fp8(model.denoiser, settings.torch_dtype())
    if settings.block_ops != "off":
        try:
            accelerate(model.denoiser, settings.block_ops, on_mismatch=settings.on_mismatch)
        except ValueError as error:
            raise ValueError(f'model.block_ops: got "{settings.block_ops}", {error}') from error
    text_tokens = int(model.encode(prompts[:1])["prompt_embeds"].shape[1])
    if settings.attention is not None:
        set_attention(model, recipe, device, text_tokens)
    # Nothing is traced on a CPU whose memory is not said.
    traces = settings.memory_gib is not None or device.type == "cuda"
    with collected() if traces else nullcontext():
        if training:
            set_checkpointing(model, recipe, device, text_tokens)
        set_tiling(model, recipe, device, text_tokens)


def set_attention(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> None:
    """Sets the backend that the recipe names, or with "auto" the one that `memory.attention` picks, and says why.

    Raises:
        ValueError: a backend that is unknown, cannot run here, or must not be used for this model.
    """
    from ..attention import choice as attention
    from ..memory.planning import specs

    asked, sampler, train = recipe.model.attention, recipe.sampler, recipe.train
    assert asked is not None
    spec = specs.resolve(model.planned_as)
    tokens = specs.tokens(spec, sampler.frames, sampler.height, sampler.width)
    tokens += text_tokens if spec.denoiser in JOINT else 0
    rows = train.micro_batch * (1 if model.unconditional(sampler.guidance_scale) is None else 2)
    dtype = torch.bfloat16 if train.mixed_precision == "bf16" else recipe.model.torch_dtype()
    shapes = attention.Shapes(rows, tokens, dtype)
    try:
        if asked == "auto":
            choice = attention.choose(model.denoiser, shapes, device, True)
        else:
            choice = attention.check(model.denoiser, asked, shapes, device, True)
        attention.apply(model.denoiser, choice)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'model.attention: got "{asked}", {error}') from error
    print(f"attention {choice.reasons[0]}", flush=True)


def set_checkpointing(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> None:
    """Applies the recipe's policy; "auto" asks the planner for the one that recomputes least, and says which.

    Raises:
        ValueError: a policy that the model cannot have, or no policy under which the replay fits.
    """
    asked = recipe.model.checkpointing
    kind, _, count = asked.partition(":")
    policy: checkpointing.Policy = checkpointing.FirstBlocks(int(count)) if kind == "first" else asked
    offload = "block_inputs" in recipe.train.offload
    if asked == "auto":
        if recipe.model.dtype == "float32" and recipe.train.mixed_precision == "no":
            raise ValueError(
                'model.checkpointing: got "auto" in float32 throughout, want model.dtype bfloat16 or '
                "train.mixed_precision bf16, which the planner counts, or a policy by name"
            )
        policy, offload = _automatic(_iteration(model, recipe, device, text_tokens))
    try:
        checkpointing.apply(model.denoiser, policy, offload=offload)
    except ValueError as error:
        raise ValueError(f'model.checkpointing: got "{asked}", {error}') from error


def _automatic(iteration: "Iteration | None") -> tuple[checkpointing.Policy, bool]:
    """The policy, and whether block inputs wait on the host."""
    if iteration is None:
        raise ValueError('model.checkpointing: got "auto" on the CPU, want model.memory_gib, or a policy by name')
    from ..memory.planning.automatic import automatic

    try:
        policy, offload, reasons = automatic(iteration)
    except ValueError as error:
        gib = iteration.settings.gpu_gib
        raise ValueError(f'model.checkpointing: got "auto" with model.memory_gib {gib:.2f}, {error}') from error
    print(f"checkpointing {reasons[0]}", *reasons[1:], sep="\n  ", flush=True)
    return policy, offload


def set_tiling(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> None:
    """With "auto", decodes in tiles where a whole micro-batch would not fit the memory, as the planner counts it."""
    if recipe.model.vae_tiling != "auto":
        return
    iteration = _iteration(model, recipe, device, text_tokens)
    decode = None if iteration is None else iteration.decoding()
    if iteration is None or decode is None:
        return
    needed = with_margins(iteration.settings, decode.bytes) / GIB
    if needed > iteration.settings.gpu_gib:
        model.tile_vae(True)
        print(f"VAE in tiles: whole, a micro-batch takes {needed:.2f} of {iteration.settings.gpu_gib:.2f} GiB")


def _iteration(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> "Iteration | None":
    """The planner's pieces for this run, or None on a CPU whose memory is not said."""
    gib = recipe.model.memory_gib
    if gib is None:
        if device.type != "cuda":
            return None
        gib = torch.cuda.get_device_properties(device).total_memory / GIB
    from ..memory.planning.planner import Iteration

    return Iteration(_settings(model, recipe, device, text_tokens, gib))


def processes() -> tuple[int, str]:
    """How many processes share the run's samples, and how they share the weights, in the planner's words."""
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import DistributedType

    if not is_initialized():
        return 1, "none"
    state = AcceleratorState()
    if state.distributed_type != DistributedType.FSDP:
        return state.num_processes, "none"
    return state.num_processes, "full_shard" if state.fsdp_plugin.reshard_after_forward else "shard_grad_op"


def _settings(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int, gib: float) -> Settings:
    """The recipe in the planner's words, with what is known of the loaded model."""
    count, strategy = processes()
    found = settings_of(
        recipe,
        model=model.planned_as,
        processes=count,
        strategy=strategy,
        text_tokens=text_tokens,
        text_encoders="precomputed",
        device=str(device),
        gpu_gib=gib,
    )
    return found.changed(expandable_segments=expands(device))
