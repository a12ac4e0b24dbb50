"""Fingerprints of sources."""

import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

# From Python 3.12 and 3.14 on.
_OPENING = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
_CLOSING = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}


def _tokens(source: str) -> Iterator[tuple[int, str]]:
    """Type and text of each token; an f-string is one string, as every Python before 3.12 reads it."""
    lines = io.StringIO(source).readlines()
    opened: list[tuple[int, int]] = []
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type in _OPENING:
            opened.append(token.start)
        elif token.type in _CLOSING:
            (row, column), (last, end) = opened.pop(), token.end
            if not opened:
                text = "".join(lines[row - 1 : last])
                yield tokenize.STRING, text[column : len(text) - len(lines[last - 1]) + end]
        elif not opened:
            yield token.type, token.string


def fingerprint_source(source: str) -> str:
    """Hash of a source without comments, layout and docstrings, the same on every Python."""
    parts: list[str] = []
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    at_start = True
    for kind, text in _tokens(inspect.cleandoc("\n" + source)):
        if kind in layout:
            at_start = at_start or kind == tokenize.NEWLINE
            continue
        if not (kind == tokenize.STRING and at_start):
            parts.append("".join(text.split()))
        at_start = False
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def fingerprint(function: Callable[..., Any]) -> str:
    """Hash of a function's source without comments, layout and docstrings."""
    return fingerprint_source(inspect.getsource(inspect.unwrap(function)))
