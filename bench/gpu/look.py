"""What this interpreter finds, as one JSON line: GPU, packages and compiled modules. The gate loads none of it."""

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any


def gpu() -> dict[str, Any] | None:
    """Of the current CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": found.name, "capability": f"{found.major}{found.minor}"}


def module(name: str) -> dict[str, Any]:
    """What a compiled module says of itself, or why it does not load."""
    try:
        found = importlib.import_module(f"dancegrpo_fast.{name}")
    except ImportError as error:
        return {"error": str(error)}
    return {"columns": found.table_columns, "architectures": getattr(found, "architectures", "")}


def modules(names: list[str]) -> dict[str, Any]:
    """Of each; those for instructions that this processor does not have are not loaded."""
    found = {name: module(name) for name in names if name in ("_cpu", "_cuda")}
    if "error" in found.get("_cpu", {"error": ""}):
        return found
    level = importlib.import_module("dancegrpo_fast._cpu").processor_level()
    return found | {name: module(name) for name in names if name.startswith("_cpu_v") and int(name[-1]) <= level}


def main() -> None:
    """Names of modules are the arguments."""
    import torch

    from dancegrpo_fast.transitions import PACKED_COLUMNS

    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    found = {
        "gpu": gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        **{name: importlib.util.find_spec(name) is not None for name in ("diffusers", "pytest_benchmark", "xdist")},
        "columns": len(PACKED_COLUMNS),
        "modules": modules(sys.argv[1:]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
