"""A prompt and its columns, and the text that a tokenizer may be given."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID


@dataclass(frozen=True)
class Prompt:
    """One prompt and its other columns."""

    text: str
    meta: Mapping[str, Any]

    def columns(self) -> dict[str, Any]:
        """`meta` as JSON holds it, which is how it is written and compared: times and decimals as text, durations in
        seconds, bytes by their SHA-256, numbers that are not finite as null.

        Raises:
            ValueError: a value of another kind.
        """
        found = {}
        for name, value in self.meta.items():
            try:
                found[name] = _plain(value)
            except TypeError as error:
                raise ValueError(
                    f'prompts: got {error} in column "{name}" of "{self.text}", want plain values'
                ) from error
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()}"
    # Of numpy, and tensors.
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"a {type(value).__name__}")


def check_text(name: str, text: str) -> None:
    """Raises ValueError, which begins with `name`, for a text that no tokenizer should be given."""
    found = re.search("[\0\ud800-\udfff]", text)
    if found:
        kind = "a null character" if found[0] == "\0" else "half of a surrogate pair"
        start = max(0, found.start() - 40)
        shown = ascii(text[start : start + 80])
        raise ValueError(f"{name}: got {shown} with {kind} at character {found.start()}, want text as UTF-8 has it")
