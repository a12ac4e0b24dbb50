"""Puts into a loaded model what a recipe says of its memory and speed: one function for each setting."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from .. import sequence
from ..activations import checkpointing
from ..activations.streaming import BlockSwap
from ..allocator import expands
from ..experts import Experts, each
from ..memory.planning.settings import GIB, Settings
from ..memory.trace.tracer import collected
from ..patch import accelerate
from ..processes import fsdp_plugin
from ..prompts import Prompt
from ..quantization import store_in_fp8
from ..recipe import Recipe, SamplerSettings
from .base import DiffusersModel
from .planning import settings_of

if TYPE_CHECKING:
    from ..memory.planning.iteration import Iteration
    from ..memory.planning.specs import Spec

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
    """Stores frozen weights in float8, puts in block ops and attention, chooses what is recomputed, tiled and streamed.

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
    for one in each(model.denoiser):
        if settings.quantization == "fp8":
            # After LoRA was added, whose layers stay as they are.
            store_in_fp8(one, settings.torch_dtype())
        if settings.block_ops != "off":
            try:
                accelerate(one, settings.block_ops, on_mismatch=settings.on_mismatch)
            except ValueError as error:
                raise ValueError(f'model.block_ops: got "{settings.block_ops}", {error}') from error
    text_tokens = int(model.encode(prompts[:1])["prompt_embeds"].shape[1])
    if recipe.train.sequence_parallel > 1:
        check_sequence(model, recipe, text_tokens)
    if settings.attention is not None:
        set_attention(model, recipe, device, text_tokens)
    # Nothing is traced on a CPU whose memory is not said.
    traces = settings.memory_gib is not None or device.type == "cuda"
    with collected() if traces else nullcontext():
        recipe = with_swap(model, recipe, device, text_tokens)
        if training:
            recipe = with_sync(model, recipe, device, text_tokens)
            model.gradient_sync = recipe.train.gradient_sync
            model.passes = choose_passes(model, recipe, device, text_tokens)
            set_checkpointing(model, recipe, device, text_tokens)
        set_tiling(model, recipe, device, text_tokens)
    set_swap(model, recipe, device)


def check_sequence(model: DiffusersModel, recipe: Recipe, text_tokens: int) -> None:
    """Raises ValueError where the tokens of the model's calls cannot be split as the recipe says."""
    from ..memory.planning import specs

    train, spec = recipe.train, specs.resolve(model.planned_as)
    sampled = {"sampler": recipe.sampler}
    if recipe.evaluation is not None:
        sampled["evaluation"] = recipe.evaluation.sampling(recipe.sampler)
    tokens = {
        f"a {whose} of {one.frames} x {one.height} x {one.width}": _tokens(model, recipe, spec, one)
        for whose, one in sampled.items()
    }
    sequence.check(model.denoiser, train.sequence_parallel, train.sequence_kind, tokens, text_tokens)
    if train.sequence_kind == "ring" and recipe.model.attention is None:
        raise ValueError(
            'train.sequence_kind: got "ring" with model.attention null, whose results lack what a ring joins them by, '
            'want model.attention "auto"'
        )


def _tokens(model: DiffusersModel, recipe: Recipe, spec: "Spec", sampler: SamplerSettings) -> int:
    """Of a sample, with those of the picture that it edits."""
    from ..memory.planning import specs

    reference = model.reference_size(recipe.model, sampler)
    return specs.tokens(spec, sampler.frames, sampler.height, sampler.width, reference)


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
    tokens = _tokens(model, recipe, spec, sampler)
    tokens += text_tokens if spec.denoiser in JOINT else 0
    rows = train.micro_batch * (1 if model.unconditional(sampler.guidance_scale) is None else 2)
    dtype = torch.bfloat16 if train.mixed_precision == "bf16" else recipe.model.torch_dtype()
    shapes = attention.Shapes(rows, tokens, dtype)
    parallel = train.sequence_kind if train.sequence_parallel > 1 else ""
    try:
        # Of two denoisers both have the architecture of the first.
        denoisers = each(model.denoiser)
        if asked == "auto":
            choice = attention.choose(denoisers[0], shapes, device, True, parallel=parallel)
        else:
            choice = attention.check(denoisers[0], asked, shapes, device, True, parallel=parallel)
        for one in denoisers:
            attention.apply(one, choice)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'model.attention: got "{asked}", {error}') from error
    print(f"attention {choice.reasons[0]}", flush=True)


def with_swap(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> Recipe:
    """The recipe with a number for `blocks_to_swap`; "auto" asks the planner for it, and says why.

    Raises:
        ValueError: "auto" on a CPU whose memory is not said.
    """
    if recipe.model.blocks_to_swap != "auto":
        return recipe
    gib = _capacity(recipe, device)
    if gib is None:
        raise ValueError('model.blocks_to_swap: got "auto" on the CPU, want model.memory_gib, or a number')
    from ..memory.planning import planner

    settings, (why,) = planner.with_swap(_settings(model, recipe, device, text_tokens, gib))
    print(f"blocks_to_swap {settings.blocks_to_swap}: {why}", flush=True)
    return replace(recipe, model=replace(recipe.model, blocks_to_swap=settings.blocks_to_swap))


def set_swap(model: DiffusersModel, recipe: Recipe, device: torch.device) -> None:
    """Moves the denoiser to the device, but for the weights that wait on the host until their block or denoiser runs.

    Raises:
        ValueError: more blocks than can wait.
    """
    count = recipe.model.blocks_to_swap
    assert count != "auto"
    if count == 0:
        if isinstance(model.denoiser, Experts) and "expert" in recipe.train.offload:
            model.denoiser.take_turns(device)
        elif isinstance(model.denoiser, Experts) or model.settings.blocks_to_swap == "auto":
            # The second, or where "auto" was asked for all of it, waits there so far.
            model.denoiser.to(device)
        return
    try:
        for one in each(model.denoiser):
            BlockSwap(one, count, device)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def with_sync(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> Recipe:
    """The recipe with "update" or "call" for `gradient_sync`, in all processes the same.

    "auto" asks the planner where processes share the weights, and says why; elsewhere gradients are there anyway.

    Raises:
        ValueError: "auto" on CPUs whose memory is not said, or in float32 throughout.
    """
    if recipe.train.gradient_sync != "auto":
        return recipe
    count, strategy = processes()
    chosen: Literal["update", "call"] = "update"
    if count > 1 and strategy != "none":
        _check_planned('train.gradient_sync: got "auto"', '"update" or "call"', recipe)
        gib = _capacity(recipe, device)
        if gib is None:
            raise ValueError('train.gradient_sync: got "auto" on CPUs, want model.memory_gib, "update" or "call"')
        from accelerate.utils import gather_object

        from ..memory.planning import planner

        settings, (why,) = planner.with_sync(_settings(model, recipe, device, text_tokens, gib))
        # A process whose device has less memory decides for all.
        chosen = "call" if "call" in gather_object([settings.gradient_sync]) else "update"
        print(why if chosen == settings.gradient_sync else "gradient_sync call: for another process", flush=True)
    return replace(recipe, train=replace(recipe.train, gradient_sync=chosen))


def choose_passes(
    model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int
) -> Literal[2, "retain", "reweight"]:
    """What `train.passes` comes to, in all processes the same; 1 asks the planner, and says why.

    Raises:
        ValueError: 1 on a CPU whose memory is not said, or in float32 throughout.
    """
    asked = recipe.train.passes
    if asked != 1:
        return asked
    _check_planned("train.passes: got 1", '2, "retain" or "reweight"', recipe)
    gib = _capacity(recipe, device)
    if gib is None:
        raise ValueError('train.passes: got 1 on the CPU, want model.memory_gib, 2, "retain" or "reweight"')
    from accelerate.utils import gather_object

    from ..memory.planning import planner

    found, why = planner.with_passes(_settings(model, recipe, device, text_tokens, gib))
    # A process whose device has less memory decides for all.
    everywhere = gather_object([found]) if processes()[0] > 1 else [found]
    kinds: dict[str, Literal[2, "retain", "reweight"]] = {"2": 2, "reweight": "reweight", "retain": "retain"}
    chosen = next(kind for kind in kinds if kind in everywhere)
    print(why if chosen == found else f"passes {chosen}: for another process", flush=True)
    return kinds[chosen]


def _check_planned(got: str, otherwise: str, recipe: Recipe) -> None:
    """Raises ValueError, which begins with `got`, for a run that the planner does not count."""
    if recipe.model.dtype == "float32" and recipe.train.mixed_precision == "no":
        raise ValueError(
            f"{got} in float32 throughout, want model.dtype bfloat16 or train.mixed_precision bf16, which the planner "
            f"counts, or {otherwise}"
        )


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
        _check_planned('model.checkpointing: got "auto"', "a policy by name", recipe)
        policy, offload = _automatic(_iteration(model, recipe, device, text_tokens))
    try:
        for one in each(model.denoiser):
            checkpointing.apply(one, policy, offload=offload)
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
    """Says the tiles; with "auto", sets the largest that fit where whole decodes do not, as the planner counts them.

    Raises:
        ValueError: "auto", and no tiles that fit.
    """
    asked = recipe.model.vae_tiling
    if asked == "on":
        print(f"VAE in tiles of {model.tile} pixels, as asked", flush=True)
    iteration = None if asked != "auto" else _iteration(model, recipe, device, text_tokens)
    if iteration is None or iteration.decode is None:
        return
    gib, tile = iteration.settings.gpu_gib, iteration.tile
    taken = iteration.decode_bytes(None) / GIB
    if taken <= gib:
        return
    found = f'model.vae_tiling: got "auto" with {gib:.2f} GiB, of which a whole decode takes {taken:.2f}'
    more = "want more memory, or less beside the decode (train.offload, train.micro_batch)"
    if tile is None:
        raise ValueError(f"{found} and {type(model.vae).__name__} has no smaller tiles, {more}")
    if iteration.decode_bytes(tile) > gib * GIB:
        raise ValueError(f"{found}, one in tiles of {tile} pixels {iteration.decode_bytes(tile) / GIB:.2f}, {more}")
    model.tile_vae(tile)
    print(f"VAE in tiles of {tile} pixels: whole, a micro-batch takes {taken:.2f} of {gib:.2f} GiB", flush=True)


def _iteration(model: DiffusersModel, recipe: Recipe, device: torch.device, text_tokens: int) -> "Iteration | None":
    """The planner's pieces for this run, or None on a CPU whose memory is not said."""
    gib = _capacity(recipe, device)
    if gib is None:
        return None
    from ..memory.planning.iteration import Iteration

    return Iteration(_settings(model, recipe, device, text_tokens, gib))


def _capacity(recipe: Recipe, device: torch.device) -> float | None:
    """GiB that the run may use; None on a CPU whose memory is not said."""
    if recipe.model.memory_gib is not None or device.type != "cuda":
        return recipe.model.memory_gib
    return torch.cuda.get_device_properties(device).total_memory / GIB


def processes() -> tuple[int, str]:
    """How many processes share the run's samples, and how they share the weights, in the planner's words."""
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import DistributedType

    if not is_initialized():
        return 1, "none"
    state = AcceleratorState()
    # On CPUs accelerate's state leaves FSDP out.
    plugin = state.fsdp_plugin if state.distributed_type == DistributedType.FSDP else fsdp_plugin()
    if plugin is None:
        return state.num_processes, "none"
    return state.num_processes, "full_shard" if plugin.reshard_after_forward else "shard_grad_op"


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
