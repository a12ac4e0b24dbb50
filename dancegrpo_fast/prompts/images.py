"""The pictures of prompts: a path, bytes, a data URI, or `{bytes, path}` as Hugging Face's tables have them."""

import base64
import binascii
import hashlib
import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

EIGHT_BITS = ("1", "L", "P", "RGB")
WITH_ALPHA = ("LA", "PA", "RGBA")


def located(value: Any, folder: Path) -> Any:
    """An `image` as it stands in a row of a file in `folder`: a path is made absolute, anything else stays."""
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        value = value["path"]
    return value if not isinstance(value, str) or _is_uri(value) else str((folder / value).resolve())


def _is_uri(value: str) -> bool:
    return value[:5].lower() == "data:"


def _content(value: Any) -> bytes | str | None:
    """The file's bytes or its path; None where the value is neither."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, (bytes, str)) else None


def key_of(text: str, value: Any) -> str:
    """What tells pictures apart without opening them: a path, or a digest of what the row holds.

    Raises:
        ValueError: the row has no picture; it names the prompt's `text`.
    """
    content = _content(value)
    if content is None:
        got = type(value).__name__ if isinstance(value, Mapping) else str(value)[:40]
        raise ValueError(
            f'prompts: got "{text}" with image {got}, want an `image` column with a path, bytes, or a data URI'
        )
    if isinstance(content, str) and not _is_uri(content):
        return content
    return f"sha256 {hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()}"


def read_image(name: str, value: Any) -> "Image":
    """A picture as RGB of 8 bits, turned as its EXIF says; 16 bits of grey are rounded to 8.

    Args:
        name: of the picture, for errors.
        value: of an `image` column, as `load_prompts` gives it.

    Raises:
        ValueError: it cannot be read, or has pixels that RGB cannot have without a choice: transparent ones, CMYK,
            floats, integers of 32 bits.
    """
    from PIL import Image, ImageOps

    content = _content(value)
    try:
        if isinstance(content, str) and _is_uri(content):
            content = _of_uri(content)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else str(content)) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    # Decoders raise errors of many kinds for damaged files.
    except Exception as error:
        raise ValueError(f"prompts: got the image {name}, want a picture that can be read ({error})") from error
    return _rgb(name, picture)


def _of_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma:
        raise ValueError("a data URI without a comma")
    raw = unquote_to_bytes(data)
    try:
        return base64.b64decode(raw, validate=True) if head.lower().endswith(";base64") else raw
    except binascii.Error as error:
        raise ValueError(f"a data URI whose base64 is damaged: {error}") from error


def _rgb(name: str, picture: "Image") -> "Image":
    from PIL import Image

    if picture.mode in WITH_ALPHA or (picture.mode in EIGHT_BITS and "transparency" in picture.info):
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"prompts: got the image {name} with transparent pixels, want a background behind them")
    elif picture.mode.startswith("I;16"):
        import numpy as np

        wide = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((wide / 257).round().astype(np.uint8))
    elif picture.mode not in EIGHT_BITS:
        raise ValueError(
            f"prompts: got the image {name} of Pillow's mode {picture.mode}, want RGB or grey of 8 bits, or grey of 16"
        )
    return picture.convert("RGB")


def check_images(images: Iterable[tuple[str, Any]]) -> None:
    """Reads pictures, in threads, each once.

    Args:
        images: a prompt's text and the value of its `image` column.

    Raises:
        ValueError: as `read_image`, or a row without a picture.
    """
    found = {key_of(text, value): value for text, value in images}
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda pair: read_image(*pair) and None, found.items()):
            pass
