"""`python -m dancegrpo_fast.patch`: which code of the installed diffusers the patches were written for."""

import importlib

import diffusers

from . import SUPPORTED
from ._fingerprints import fingerprint
from ._recognise import Family, resolve


def main() -> int:
    """Prints every source with its fingerprint; the exit code counts those that differ."""
    print(f"diffusers {diffusers.__version__}")
    changed = 0
    for name, module in SUPPORTED.items():
        family: Family = importlib.import_module(f".{module}", __package__).FAMILY
        print(name)
        for path, known in family.sources.items():
            function = resolve(path)
            found = "missing" if function is None else fingerprint(function)
            changed += found != known
            print(f"  {path} {found}{'' if found == known else f' differs from {known}'}")
    return min(changed, 100)


if __name__ == "__main__":
    raise SystemExit(main())
