"""Command line of the demo: build a base, or write the prompt files."""

import argparse
import sys
from pathlib import Path

BASES = ("digits", "digits_ddim", "signs", "video", "video_i2v")


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m dancegrpo_fast.demo` and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dancegrpo_fast.demo", description=__doc__)
    parser.add_argument("what", choices=(*BASES, "prompts"), help="the base to build, or `prompts`")
    parser.add_argument("--output", type=Path, help="folder to write (runs/bases/NAME, or recipes/prompts)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (2)")
    parser.add_argument("--force", action="store_true", help="build again even if the base is there")
    options = parser.parse_args(arguments)
    if options.what == "prompts":
        from . import data, video

        folder = options.output or Path("recipes/prompts")
        for path in [*data.write_prompts(folder), *video.write_prompts(folder)]:
            print(path)
        return 0
    import torch

    if options.threads < 1:
        parser.error(f"--threads: got {options.threads}, want at least 1")
    torch.set_num_threads(options.threads)
    from .bases import build

    try:
        build(options.what, options.output or Path("runs/bases") / options.what, options.force)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
