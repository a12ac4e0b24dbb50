"""What a denoiser is and what it is called with: shipped models, local diffusers folders and hub names."""

import json
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .families import FAMILIES, Call, Family

CONFIGS = resources.files(__package__) / "configs"


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder: how many parameters, and how they were counted."""

    name: str
    parameters: int
    source: str


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
        text_encoders: () where unknown.
        keep_in_float32: parts of parameter names that diffusers leaves in float32.
        hub: where the published weights are, or None.
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
    text_encoders: tuple[TextEncoder, ...]
    keep_in_float32: tuple[str, ...]
    hub: str | None

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
    time, height, width = family.compression
    if "temporal_compression_ratio" in vae:
        return vae["temporal_compression_ratio"], vae["spatial_compression_ratio"], vae["spatial_compression_ratio"]
    if "temperal_downsample" in vae:
        steps = vae["temperal_downsample"]
        space = vae.get("scale_factor_spatial") or 2 ** len(steps)
        # An image model has the video VAE, and decodes one frame.
        frames = vae.get("scale_factor_temporal") or 2 ** sum(steps)
        return (frames if time > 1 else 1), space, space
    if "block_out_channels" in vae:
        height = width = 2 ** (len(vae["block_out_channels"]) - 1)
    return time, height, width


def _patch(config: dict[str, Any], family: Family, unet: bool) -> tuple[int, int, int]:
    if unet:
        return 1, 1, 1
    size = 2 if family.packed else config.get("patch_size", 2)
    if isinstance(size, int):
        return config.get("patch_size_t") or 1, size, size
    time, height, width = size
    return time, height, width


def _spec(name: str, denoiser: dict[str, Any], vae: dict[str, Any], **known: Any) -> Spec:
    """From the two configurations; `known` has what those do not say."""
    import diffusers

    kind = denoiser.get("_class_name", "")
    if kind not in FAMILIES:
        raise ValueError(f'model: got a "{kind}" in {name}, want one of {", ".join(FAMILIES)}')
    family = FAMILIES[kind]
    cls = getattr(diffusers, kind)
    defaults = {k: v.default for k, v in _parameters(cls).items()}
    config = {k: denoiser.get(k, default) for k, default in defaults.items()}
    patch = _patch(config, family, kind == "UNet2DConditionModel")
    channels = config["in_channels"] // (4 if family.packed else 1)
    return Spec(
        name=name,
        denoiser=kind,
        config=config,
        vae=vae.get("_class_name"),
        vae_config={k: v for k, v in vae.items() if not k.startswith("_")},
        latent_channels=vae.get("latent_channels") or vae.get("z_dim") or channels,
        compression=_compression(vae, family),
        patch=patch,
        text_tokens=known.get("text_tokens", family.text_tokens),
        text_encoders=tuple(TextEncoder(**encoder) for encoder in known.get("text_encoders", ())),
        keep_in_float32=tuple(cls._keep_in_fp32_modules or ()),
        hub=known.get("hub"),
    )


def _parameters(cls: Any) -> dict[str, Any]:
    import inspect

    return {k: v for k, v in inspect.signature(cls.__init__).parameters.items() if k != "self"}


def _from_folder(folder: Path) -> Spec:
    found = [folder / sub / "config.json" for sub in ("transformer", "unet", ".")]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        raise ValueError(f"model: got the folder {folder}, want transformer/config.json or unet/config.json in it")
    vae = folder / "vae" / "config.json"
    vae_config = json.loads(vae.read_text(encoding="utf-8")) if vae.is_file() else {}
    return _spec(str(folder), json.loads(file.read_text(encoding="utf-8")), vae_config)


def _from_hub(name: str) -> Spec:
    import diffusers
    from huggingface_hub.errors import LocalEntryNotFoundError

    found: dict[str, dict[str, Any]] = {}
    reason: BaseException | None = None
    for sub in ("transformer", "unet", "vae"):
        try:
            # Any class reads any model's.
            found[sub] = diffusers.AutoencoderKL.load_config(name, subfolder=sub)
        except (OSError, ValueError) as error:
            # diffusers calls a file missing when the hub could not be asked.
            unreachable = isinstance(error.__context__, LocalEntryNotFoundError)
            reason = error.__context__ if unreachable else reason or error
            if unreachable:
                break
    denoiser = found.get("transformer") or found.get("unet")
    if denoiser is None:
        known = ", ".join(names())
        raise ValueError(
            f'model: got "{name}", want one of {known}, a diffusers folder, or a name on the hub that can be reached '
            f"({type(reason).__name__}: {reason})"
        ) from reason
    return _spec(name, denoiser, found.get("vae", {}))


def resolve(model: str | Path) -> Spec:
    """The model of this name.

    Args:
        model: a shipped name (see `names`), a local diffusers folder, or the name of a repository on the hub, which is
            not asked for a shipped model's.

    Raises:
        ValueError: nothing of that name, an unreachable hub, or an architecture that is not known.
    """
    if str(model) not in names() and Path(model).is_dir():
        return _from_folder(Path(model))
    for name in names():
        known = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
        if str(model) in (name, known["hub"]):
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


def build(spec: Spec, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The denoiser on the `meta` device, in training mode, all parameters asking for gradients."""
    import diffusers

    cls = getattr(diffusers, spec.denoiser)
    with torch.device("meta"):
        model: nn.Module = cls(**spec.config)
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


def tokens(spec: Spec, frames: int, height: int, width: int) -> int:
    """Image or video tokens of one sample."""
    return prod(latent_grid(spec, frames, height, width)) // prod(spec.patch)


def inputs(
    spec: Spec,
    frames: int,
    height: int,
    width: int,
    batch: int = 1,
    text_tokens: int | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Keyword arguments of one denoiser call; numbers in them are not set.

    Args:
        spec: the model.
        frames, height, width: in pixels.
        batch: rows of the call; twice the samples under classifier-free guidance.
        text_tokens: of one prompt; None: as the model's pipeline pads it.
        device: of the tensors.
        dtype: of latents and embeddings; times are float32.

    Raises:
        ValueError: sizes that the model cannot have.
    """
    for name, value in (("batch", batch), ("text_tokens", text_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    grid = latent_grid(spec, frames, height, width)
    text = spec.text_tokens if text_tokens is None else text_tokens
    return FAMILIES[spec.denoiser].inputs(Call(spec, batch, grid, text, device, dtype)) | {"return_dict": False}
