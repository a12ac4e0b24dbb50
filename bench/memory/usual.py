"""What the atlas asks of every model: at which sizes, what is trained, on how many cards, and what may leave a card."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.rewards import REWARDS
from dancegrpo_fast.memory.planning.settings import Settings

Size = tuple[int, int, int]  # frames, height, width

# Usual sizes: what public GRPO scripts train at (DanceGRPO scripts/finetune, Flow-GRPO config, Flow-Factory
# examples/grpo), what each model's pipeline in diffusers draws by default, and otherwise a choice of ours.
_IMAGE: tuple[Size, ...] = ((1, 512, 512), (1, 1024, 1024))
_VIDEO: tuple[Size, ...] = ((17, 480, 832), (49, 480, 832), (81, 480, 832))
_WAN: tuple[Size, ...] = ((33, 256, 416), (81, 480, 832))
SIZES: dict[str, tuple[Size, ...]] = {
    "cogvideox-2b": ((49, 480, 720),),
    "cogvideox-5b": ((49, 480, 720),),
    "flux-dev": ((1, 512, 512), (1, 720, 720), (1, 1024, 1024)),
    "hunyuan-video": ((1, 720, 720), (53, 480, 640), (129, 720, 1280)),
    "hunyuan-video-15": ((61, 480, 832), (121, 480, 832)),
    "ltx-2": ((121, 512, 768),),
    "ltx-video": ((49, 512, 768), (161, 512, 704)),
    "qwen-image": ((1, 512, 512), (1, 720, 720), (1, 1024, 1024)),
    "sd14": ((1, 512, 512),),
    "skyreels-i2v": ((53, 400, 640), (97, 544, 960)),
    "wan21-1.3b": _WAN,
    "wan21-14b": (*_WAN, (81, 720, 1280)),
    "wan22-5b": ((49, 480, 832), (121, 704, 1280)),
    "wan22-a14b": (*_WAN, (81, 720, 1280)),
}


def sizes(model: str) -> tuple[Size, ...]:
    """The usual ones of a model; of one that the table does not know those of any picture or video model."""
    return SIZES.get(model) or (_VIDEO if specs.resolve(model).is_video else _IMAGE)


class Away(NamedTuple):
    """What leaves the card while it is not used, in words and as settings; it changes bytes and seconds only."""

    words: str
    changes: Mapping[str, Any]


class Trained(NamedTuple):
    """What is trained: in words, as settings, on how many cards, and what may be away there, nothing first."""

    words: str
    changes: Mapping[str, Any]
    counts: tuple[int, ...]
    away: tuple[Away, ...]


NOTHING = Away("", {})
_WAITING = {"offload": ("vae", "rewards"), "text_encoders": "precomputed"}
_IDLE = Away(
    "denoiser, VAE and reward model wait on the host while another runs, and prompts are encoded beforehand",
    {**_WAITING, "offload": ("denoiser", "vae", "rewards")},
)
_SWAPPED = Away(
    "VAE and reward model wait on the host while another runs, blocks of the denoiser stream from there, and prompts"
    " are encoded beforehand",
    {**_WAITING, "blocks_to_swap": "auto"},
)
# Shards of a denoiser stay.
_IDLE_SHARDED = Away(
    "VAE and reward model wait on the host while another runs, and prompts are encoded beforehand", _WAITING
)


_LORA = (NOTHING, _IDLE, _SWAPPED)
# As the paper's recipes have it.
_ALL = {"dtype": "float32", "mixed_precision": "bf16"}
TRAINED = (
    Trained("LoRA 32", {"lora": 32}, (1,), _LORA),
    Trained("LoRA 32 on nf4", {"lora": 32, "quantization": "nf4"}, (1,), _LORA),
    Trained("LoRA 32 on fp8", {"lora": 32, "quantization": "fp8"}, (1,), _LORA),
    Trained("all weights", _ALL, (1,), (NOTHING, _IDLE)),
    Trained("all weights", _ALL, (8, 16, 32), (NOTHING, _IDLE_SHARDED)),
)
# Of guidance only whether there is any counts: without an embedding of it a call has two rows.
GUIDANCE = 5.0


def settings(model: str, size: Size, trained: Trained, count: int) -> Settings:
    """Of one GPU's share: the paper's group of 12 samples, 16 steps, 0.6 of them trained on, a reward model."""
    frames, height, width = size
    return Settings(
        model,
        frames=frames,
        height=height,
        width=width,
        guidance_scale=GUIDANCE,
        fsdp=count,
        rewards=(REWARDS["videoalign" if frames > 1 else "hps"],),
        **trained.changes,
    )
