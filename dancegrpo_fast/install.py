"""The line that adds what is missing to an installation, by how it was made."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

# Modules that an extra of pyproject.toml brings, and no other package that is needed.
EXTRAS = {
    "train": (
        *("accelerate", "diffusers", "ftfy", "jsonargparse", "matplotlib", "peft", "PIL", "pyarrow", "safetensors"),
        *("tensorboard", "tqdm", "transformers"),
    ),
    "demo": ("sklearn",),
    "judge": ("httpx",),
    "ocr": ("onnxruntime", "rapidocr"),
    "quantized": ("bitsandbytes",),
    "triton": ("triton",),
}


def install_line(extra: str) -> str:
    """What installs this package again where it came from, with an extra."""
    tool, came = "pip", {}
    try:
        found = metadata.distribution("dancegrpo_fast")
        tool = "uv pip" if (found.read_text("INSTALLER") or "").strip() == "uv" else "pip"
        # PEP 610: absent where an index is where it came from.
        came = json.loads(found.read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        checkout = Path(__file__).parents[1]
        if (checkout / "pyproject.toml").is_file():
            came = {"url": checkout.as_uri(), "dir_info": {}}
    url, what = came.get("url", ""), f"dancegrpo_fast[{extra}]"
    path = url2pathname(urlsplit(url).path)
    gone = f" (once {path} is there again)" if url.startswith("file:") and not Path(path).exists() else ""
    if "dir_info" in came:
        what, tool = f"{path}[{extra}]", f"{tool} install" + " --editable" * came["dir_info"].get("editable", False)
        return f'{tool} "{what}"{gone}'
    if "vcs_info" in came:
        vcs = came["vcs_info"]
        url = f"{vcs['vcs']}+{url}@{vcs.get('requested_revision', vcs['commit_id'])}"
    if came.get("subdirectory"):
        url += f"#subdirectory={came['subdirectory']}"
    return f'{tool} install "{what} @ {url}"{gone}' if url else f'{tool} install "{what}"'


def missing(error: ImportError) -> str:
    """The error, and the line that mends it where an extra of this package does."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"{error}; want {install_line(extra)}"
    return str(error)
