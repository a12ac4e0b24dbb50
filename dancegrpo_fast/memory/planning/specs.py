"""What a denoiser is and what it is called with: shipped models, local diffusers folders and hub names."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import folders, guessed
from .families import FAMILIES, Call, Family
from .folders import Part

CONFIGS = resources.files(__package__) / "configs"
# Small files that say what a repository on the hub consists of.
_SMALL = ("model_index.json", "config.json", "*/config.json")


@dataclass(frozen=True)
class Spec:
    """One model.

    Attributes:
        name: as it was asked for.
        denoiser: class name in diffusers.
        config: its configuration.
        vae, vae_config: the same of the VAE, or None and {} where unknown.
        latent_channels: that the VAE decodes.
        compression: pixels a latent, in time, height and width.
        patch: latents a token, in time, height and width.
        text_tokens: of one prompt, as the pipelines pad it.
        text_encoders: that make the conditions, of pictures too; () where unknown.
        keep_in_float32: parts of parameter names that diffusers leaves in float32.
        hub: where the published weights are, or None.
        others: parts of the pipeline that do something else.
        missing: in words, what is in no count.
        experts: denoisers of this class, which take turns along the steps.
        boundary_ratio: share of the noise at which the second of them takes over, or None.
        times_per_token: whether the denoiser gets a time for each token.
        family: what all models of its class share.
        assumed: in words, where the class is not known.
    """

    name: str
    denoiser: str
    config: dict[str, Any]
    vae: str | None
    vae_config: dict[str, Any]
    latent_channels: int
    compression: tuple[int, int, int]
    patch: tuple[int, int, int]
    text_tokens: int
    text_encoders: tuple[Part, ...]
    keep_in_float32: tuple[str, ...]
    hub: str | None
    family: Family
    others: tuple[Part, ...] = ()
    missing: tuple[str, ...] = ()
    experts: int = 1
    boundary_ratio: float | None = None
    times_per_token: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether more than one frame can be asked for."""
        return self.compression[0] > 1

    @property
    def guides_by_batch(self) -> bool:
        """Whether guidance takes a second row: where it is no input, and in SkyReels, which has one all the same."""
        first_frame = self.denoiser.startswith("HunyuanVideo") and self.config["in_channels"] > self.latent_channels
        return first_frame or not self.config.get("guidance_embeds")


def names() -> list[str]:
    """Models whose configurations are shipped."""
    return sorted(path.name.removesuffix(".json") for path in CONFIGS.iterdir() if path.name.endswith(".json"))


def _compression(vae: dict[str, Any], family: Family) -> tuple[int, int, int]:
    time, space, _ = family.compression
    if "temperal_downsample" in vae:
        steps = vae["temperal_downsample"]
        space = vae.get("scale_factor_spatial") or 2 ** len(steps)
        # An image model has the video VAE, and decodes one frame.
        frames = vae.get("scale_factor_temporal") or 2 ** sum(steps)
        return (frames if time > 1 else 1), space, space
    if time > 1 and vae.get("temporal_compression_ratio"):
        time = int(vae["temporal_compression_ratio"])
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if blocks:
        patch = vae.get("patch_size")
        space = 2 ** (len(blocks) - 1) * (patch if isinstance(patch, int) else 1)
    space = vae.get("spatial_compression_ratio") or space
    return time, space, space


def _patch(config: dict[str, Any], family: Family, unet: bool) -> tuple[int, int, int]:
    if unet:
        return 1, 1, 1
    size = 2 if family.packed else config.get("patch_size") or config.get("all_patch_size") or 2
    if isinstance(size, int):
        return config.get("patch_size_t") or 1, size, size
    if len(size) == 1:
        return (*config["all_f_patch_size"], *size, *size)
    time, height, width = (1, *size)[-3:]
    return time, height, width


def _spec(name: str, denoiser: dict[str, Any], vae: dict[str, Any], **known: Any) -> Spec:
    """From the two configurations; `known` has what those do not say."""
    import diffusers

    kind = denoiser.get("_class_name", "")
    cls = getattr(diffusers, kind, None)
    if kind not in FAMILIES and not guessed.is_denoiser(cls):
        raise ValueError(f'model: got a "{kind}" in {name}, want {", ".join(FAMILIES)} or another of diffusers')
    defaults = {k: v.default for k, v in _parameters(cls).items()}
    config = {k: denoiser.get(k, default) for k, default in defaults.items()}
    latents = vae.get("latent_channels") or vae.get("z_dim")
    family = FAMILIES[kind] if kind in FAMILIES else guessed.family(config, vae)
    patch = _patch(config, family, kind == "UNet2DConditionModel")
    channels = config["in_channels"] // (4 if family.packed else 1)
    known["text_encoders"] = tuple(map(_part, known.get("text_encoders", ())))
    known["others"] = tuple(map(_part, known.get("others", ())))
    spec = Spec(
        name=name,
        denoiser=kind,
        config=config,
        vae=vae.get("_class_name"),
        vae_config={k: v for k, v in vae.items() if not k.startswith("_")},
        latent_channels=latents or channels,
        compression=_compression(vae, family),
        patch=patch,
        keep_in_float32=tuple(cls._keep_in_fp32_modules or ()),  # type: ignore[union-attr]  # a class of diffusers
        family=family,
        **{"text_tokens": family.text_tokens, "hub": None, **known},
    )
    return spec if kind in FAMILIES else _guessed(spec)


def _guessed(spec: Spec) -> Spec:
    """Of a class that is not known: with the first of the guesses that its forward takes."""
    failed: dict[str, list[str]] = {}
    for layout, make in guessed.LAYOUTS.items():
        tried = replace(spec, family=replace(spec.family, inputs=make))
        try:
            given = small_inputs(tried)
            guessed.run(build(tried), given)
        except guessed.FAILURES as error:
            [why, *_] = str(error).splitlines() or [type(error).__name__]
            failed.setdefault(why, []).append(layout)
            continue
        return replace(tried, assumed=(guessed.words(spec.denoiser, layout, given),))
    raise ValueError(
        f"model: got a {spec.denoiser} in {spec.name}, which no guess of its inputs runs, want one of "
        f"{', '.join(FAMILIES)}; tried with latents as "
        + "; as ".join(f"{', '.join(layouts)}: {why}" for why, layouts in failed.items())
    )


def small_inputs(spec: Spec) -> dict[str, Any]:
    """Of a call that takes little time: 8 x 8 tokens of 4 frames or one."""
    height, width = (8 * n * patch for n, patch in zip(spec.compression[1:], spec.patch[1:], strict=True))
    frames = (4 * spec.patch[0] - 1) * spec.compression[0] + 1 if spec.is_video else 1
    return inputs(spec, frames, height, width)


def _part(given: Part | dict[str, Any]) -> Part:
    return given if isinstance(given, Part) else Part(**given)


def _parameters(cls: Any) -> dict[str, Any]:
    import inspect

    return {k: v for k, v in inspect.signature(cls.__init__).parameters.items() if k != "self"}


def _from_folder(name: str, folder: Path) -> Spec:
    found = folders.read(folder)
    return _spec(
        name,
        found.denoiser,
        found.vae,
        text_encoders=found.encoders,
        others=found.others,
        missing=found.missing,
        experts=found.experts,
        boundary_ratio=found.boundary_ratio,
        times_per_token=found.times_per_token,
    )


def _from_hub(name: str) -> Spec:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = snapshot_download(name, allow_patterns=list(_SMALL))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f'model: got "{name}", want one of {", ".join(names())}, a diffusers folder, or a name on the hub that '
            f"can be reached ({type(error).__name__}: {error})"
        ) from error
    return _from_folder(name, Path(folder))


def resolve(model: str | Path) -> Spec:
    """The model of this name.

    Args:
        model: a shipped name (see `names`), a local diffusers folder, or the name of a repository on the hub, of which
            configurations are downloaded, and which is not asked for a shipped model's.

    Raises:
        ValueError: nothing of that name, an unreachable hub, or an architecture that is not known and not guessed.
    """
    if str(model) not in names() and Path(model).is_dir():
        return _from_folder(str(model), Path(model))
    for name in names():
        known = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
        # Others of the same architecture and size, as models that edit.
        if str(model) in (name, known["hub"], *known.pop("also", ())):
            return _spec(str(model), known.pop("denoiser"), known.pop("vae"), **known)
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise ValueError(
            f'model: got "{model}", want one of {", ".join(names())}, a diffusers folder, or a name on the hub'
        )
    return _from_hub(str(model))


def cast(model: nn.Module, dtype: torch.dtype, keep_in_float32: tuple[str, ...] = ()) -> nn.Module:
    """Floating-point parameters and saved buffers in `dtype`, but for the named parts: as diffusers loads weights."""
    saved = set(model.state_dict())
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                full = f"{path}.{name}" if path else name
                if value is None or not value.is_floating_point() or full not in saved:
                    continue
                kept = set(full.split(".")) & set(keep_in_float32)
                value.data = value.data.to(torch.float32 if kept else dtype)
    return model


_prototypes: dict[str, nn.Module] = {}


def prototype(spec: Spec) -> nn.Module:
    """The denoiser on the `meta` device in float32, to look at and not to change."""
    import diffusers

    key = f"{spec.denoiser} {spec.config}"
    if key not in _prototypes:
        with torch.device("meta"):
            _prototypes[key] = getattr(diffusers, spec.denoiser)(**spec.config)
    return _prototypes[key]


def build(
    spec: Spec, dtype: torch.dtype = torch.bfloat16, blocks: Mapping[str, Sequence[int]] | None = None
) -> nn.Module:
    """The denoiser on the `meta` device, in training mode, all parameters asking for gradients.

    Args:
        spec: the model.
        dtype: of the parameters that diffusers would load in it.
        blocks: of lists of blocks, by their path, those that it has, each number a block of its own; others are whole.
    """
    whole = prototype(spec)
    # To make all blocks and drop most takes longer than to copy some.
    lists = {whole.get_submodule(path): places for path, places in (blocks or {}).items()}
    memo: dict[int, Any] = {
        id(held): nn.ModuleList(copy.deepcopy(held.get_submodule(str(place))) for place in places)
        for held, places in lists.items()
    }
    model = copy.deepcopy(whole, memo)
    if spec.family.sorts_text or spec.denoiser not in FAMILIES:
        guessed.count_masked(model)
    return cast(model, dtype, spec.keep_in_float32).train()


def build_vae(spec: Spec, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The VAE on the `meta` device, in evaluation mode, without gradients.

    Raises:
        ValueError: the model's VAE is not known.
    """
    import diffusers

    if spec.vae is None:
        raise ValueError(f"model: got {spec.name}, whose VAE is not known; want a folder with vae/config.json")
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, spec.vae).from_config(dict(spec.vae_config))
    return cast(model, dtype).eval().requires_grad_(False)


def latent_grid(spec: Spec, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, height and width.

    Raises:
        ValueError: a size that the model cannot have.
    """
    time = spec.compression[0]
    if not spec.is_video and frames != 1:
        raise ValueError(f"frames: got {frames}, want 1 for the image model {spec.name}")
    if frames < 1 or (frames - 1) % time:
        raise ValueError(f"frames: got {frames}, want {time} n + 1 for {spec.name}")
    grid = [(frames - 1) // time + 1]
    for name, size, step, patch in zip(
        ("height", "width"), (height, width), spec.compression[1:], spec.patch[1:], strict=True
    ):
        if size < 1 or size % (step * patch):
            raise ValueError(f"{name}: got {size}, want a multiple of {step * patch} for {spec.name}")
        grid.append(size // step)
    if grid[0] % spec.patch[0]:
        raise ValueError(f"frames: got {frames}, want latent frames in multiples of {spec.patch[0]} for {spec.name}")
    return grid[0], grid[1], grid[2]


def _reference_grid(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
    """Latent height and width of a picture to edit."""
    if not any(reference):
        return 0, 0
    if not spec.family.reference:
        raise ValueError(
            f"reference_height: got {reference[0]} for {spec.name}, want 0: a {spec.denoiser} is not given pictures "
            "as tokens"
        )
    sizes = zip(("height", "width"), reference, spec.compression[1:], spec.patch[1:], strict=True)
    for name, size, step, patch in sizes:
        if size < 1 or size % (step * patch):
            raise ValueError(f"reference_{name}: got {size}, want a multiple of {step * patch} for {spec.name}")
    return reference[0] // spec.compression[1], reference[1] // spec.compression[2]


def tokens(spec: Spec, frames: int, height: int, width: int, reference: tuple[int, int] = (0, 0)) -> int:
    """Image or video tokens of one sample, with those of a picture to edit."""
    own = prod(latent_grid(spec, frames, height, width)) // prod(spec.patch)
    return own + prod(_reference_grid(spec, reference)) // prod(spec.patch)


def inputs(
    spec: Spec,
    frames: int,
    height: int,
    width: int,
    batch: int = 1,
    text_tokens: int | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
    reference: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Keyword arguments of one denoiser call; numbers in them are not set.

    Args:
        spec: the model.
        frames, height, width: in pixels.
        batch: rows of the call; twice the samples under classifier-free guidance.
        text_tokens: of one prompt; None: as the model's pipeline pads it.
        device: of the tensors.
        dtype: of latents and embeddings; times are float32.
        reference: height and width of a picture to edit, in pixels; 0, 0 for none.

    Raises:
        ValueError: sizes that the model cannot have.
    """
    for name, value in (("batch", batch), ("text_tokens", text_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    grid = latent_grid(spec, frames, height, width)
    text = spec.text_tokens if text_tokens is None else text_tokens
    call = Call(spec, batch, grid, text, device, dtype, _reference_grid(spec, reference))
    return spec.family.inputs(call) | {"return_dict": False}
