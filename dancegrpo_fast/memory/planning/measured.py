"""Speeds that `dancegrpo-fast rates` measured, kept by the device's name in a file of the user's cache."""

import json
import math
import os
import platform
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...files import write_text
from .cards import EAGER_RATES, Rates, eager
from .settings import Settings

NAMES = [field.name for field in fields(Rates)]


def path() -> Path:
    """Of the file: in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dancegrpo_fast" / "rates.json"


def name_of(device: str) -> str | None:
    """The name of a device of this machine, "cpu", "cuda" or "cuda:0"; None of a description such as "cuda:sm90".

    A CPU's has torch's threads in it.
    """
    import torch

    if device == "cpu":
        return f"{_cpu()}, {torch.get_num_threads()} threads"
    if not re.fullmatch(r"cuda(:\d+)?", device) or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def keep(name: str, reached: Rates, torch_version: str, date: str) -> Path:
    """Adds what a device's single operators reach to the file, in place of what was there of it.

    Returns:
        The file.

    Raises:
        ValueError: a file is there that `rates` did not write.
        OSError: it cannot be written; it names the file.
    """
    file = path()
    found = _read(file) if file.exists() else {}
    found[name] = {"torch": torch_version, "date": date, "rates": vars(reached)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found, indent=1) + "\n")
    return file


def kept(name: str) -> Rates | None:
    """What plans count with on a device, or None where it was not measured.

    Raises:
        ValueError: a file is there that `rates` did not write.
    """
    file = path()
    entry = _read(file).get(name) if file.exists() else None
    return None if entry is None else planned(Rates(**entry["rates"]), name)


def planned(reached: Rates, device: str) -> Rates:
    """What eager models are assumed to reach on a device of this name, where single operators reach so much."""
    share = eager(device)
    return Rates(**{name: value * (share if name in EAGER_RATES else 1) for name, value in vars(reached).items()})


def at_hand(settings: Settings, device: str) -> Settings:
    """The same at the speed of a device of this machine, if it was measured.

    Raises:
        ValueError: a file is there that `rates` did not write.
    """
    # What was never measured needs no torch.
    name = name_of(device) if path().exists() else None
    found = None if name is None else kept(name)
    return settings if found is None or name is None else settings.changed(rates=found, measured=name)


def _read(file: Path) -> dict[str, Any]:
    """The entries by device, checked."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(file, "no JSON") from error
    if not isinstance(found, dict):
        raise _refused(file, "no devices")
    for name, entry in found.items():
        rates = entry.get("rates") if isinstance(entry, dict) else None
        if not isinstance(rates, dict) or sorted(rates) != sorted(NAMES):
            raise _refused(file, f'other entries of "{name}" than torch, date and rates of {", ".join(NAMES)}')
        for rate, value in rates.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise _refused(file, f'{rate} {value!r} of "{name}"')
    return found


def _refused(file: Path, what: str) -> ValueError:
    return ValueError(
        f"rates: got {file} with {what}, want what `dancegrpo-fast rates` writes; without the file plans assume rates"
    )
