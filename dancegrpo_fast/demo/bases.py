"""Build small pretrained generators as ordinary diffusers folders, with part of their captions wrong."""

import shutil
import time
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file

from . import image_bases, video, video_bases
from .fitting import Base, train_digit_net

BASES = {
    "digits": Base("flux", "digits", wrong=0.5, steps=1200, batch=64, rate=4e-3),
    "digits_ddim": Base("unet", "digits", wrong=0.5, steps=1200, batch=64, rate=2e-3),
    "signs": Base("flux", "signs", wrong=0.35, steps=1200, batch=64, rate=4e-3),
    "video": Base("hunyuan_video", "clips", wrong=0.5, steps=2500, batch=48, rate=4e-3),
    "video_i2v": Base("skyreels_i2v", "clips", wrong=0.5, steps=2000, batch=48, rate=4e-3),
}


def build(name: str, target: Path, force: bool = False) -> bool:
    """Train the base `name` and write it to `target`.

    The folder is written beside `target` and renamed at the end, so that a folder that exists is whole.

    Args:
        name: A key of `BASES`.
        target: Folder to create.
        force: Build again and replace a base that is there.

    Returns:
        False if a complete base was there already and nothing was done.

    Raises:
        ValueError: `name` is unknown, or `target` holds something other than a complete base.
    """
    if name not in BASES:
        raise ValueError(f"name: got {name!r}, want one of {sorted(BASES)}")
    base = BASES[name]
    present = (target / "model_index.json").is_file()
    if target.exists() and not present and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target: {target} holds something else, want a new or empty folder or an earlier base")
    missing = [file for file in base_files(base) if not (target / file).is_file()]
    if present and not force:
        if missing:
            raise ValueError(f"target: {target} lacks {', '.join(missing)}; build it again with --force")
        print(f"{target} is there and complete; nothing to do (--force builds it again)", flush=True)
        return False
    diffusers_logging.set_verbosity_error()
    began = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        trained = (video_bases if base.content == "clips" else image_bases).train(base, partial)
        if base.content != "signs":
            trained["reward"] = train_digit_net()
            (partial / "reward").mkdir()
            save_file(trained["reward"].state_dict(), partial / "reward" / "digit_cnn.safetensors")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in trained.items()}
    parts = ", ".join(f"{part} {count / 1e6:.3f} M" for part, count in counts.items())
    print(f"{target}: {size / 1e6:.2f} MB, {time.perf_counter() - began:.0f} s; parameters: {parts}", flush=True)
    return True


def base_files(base: Base) -> list[str]:
    """Return the files, relative to the folder, that a complete base has."""
    network = "unet" if base.family == "unet" else "transformer"
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", network)]
    configs = ["vae/config.json", f"{network}/config.json", "scheduler/scheduler_config.json", "model_index.json"]
    prompts = ["prompt_embeds/identity.json"]
    reward = ["reward/digit_cnn.safetensors"] * (base.content != "signs")
    images = [f"images/{row}" for row in video.image_names()] * (base.family == "skyreels_i2v")
    return weights + configs + prompts + reward + images
