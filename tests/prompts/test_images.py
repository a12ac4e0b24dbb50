"""The pictures of prompts: what is opened, how it becomes RGB, and what is refused."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dancegrpo_fast.prompts import Prompt, load_prompts
from dancegrpo_fast.prompts.images import check_images, key_of, read_image
from dancegrpo_fast.run.identity import prompts_digest

Image = pytest.importorskip("PIL.Image")
RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def encoded(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def colours() -> Any:
    return Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "palette", "bilevel", "turned", "opaque"])
def test_what_diffusers_reads_is_read_the_same(kind: str, tmp_path: Path) -> None:
    from diffusers.utils import load_image

    picture, options = colours(), {}
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    mode = {"palette": "P", "bilevel": "1", "opaque": "RGBA"}.get(kind, "RGB")
    path = tmp_path / "a.picture"
    path.write_bytes(encoded(picture.convert(mode), "JPEG" if kind == "JPEG" else "PNG", **options))
    read = read_image("a", str(path))
    assert read.mode == "RGB" and read.size == ((4, 6) if kind == "turned" else (6, 4))
    assert np.array_equal(read, load_image(str(path)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_of_grey_keep_their_brightness(kind: str) -> None:
    wide = RAMP.astype(np.uint16) * 257
    wide[0, :2] = 127, 65_535
    read = np.asarray(read_image("a", encoded(Image.fromarray(wide), kind)))
    wanted = RAMP.copy()
    wanted[0, :2] = 0, 255
    assert np.array_equal(read, np.repeat(wanted[..., None], 3, axis=-1))


def damaged() -> dict[str, tuple[bytes, str]]:
    clear, grey = colours().convert("RGBA"), Image.fromarray(RAMP)
    clear.putpixel((0, 0), (9, 9, 9, 254))
    unread, whole = "want a picture that can be read", encoded(colours(), "JPEG")
    return {
        "alpha": (encoded(clear), "with transparent pixels, want a background"),
        "transparent colour": (encoded(grey, transparency=0), "with transparent pixels"),
        "float": (encoded(grey.convert("F"), "TIFF"), "mode F, want RGB or grey of 8 bits, or grey of 16"),
        "32 bits": (encoded(grey.convert("I"), "TIFF"), "mode I, want"),
        "CMYK": (encoded(colours().convert("CMYK"), "JPEG"), "mode CMYK, want"),
        "cut JPEG": (whole[:-20], unread),
        "cut PNG": (encoded(colours())[:-30], unread),
        "text": (b"not a picture", unread),
    }


@pytest.mark.parametrize("kind", damaged())
def test_what_has_no_one_meaning_is_refused(kind: str) -> None:
    content, message = damaged()[kind]
    with pytest.raises(ValueError, match=rf"^prompts: got the image some\.png.* {message}"):
        read_image("some.png", content)


def test_every_way_to_hold_a_picture_gives_the_same(tmp_path: Path) -> None:
    content = encoded(colours())
    (tmp_path / "a.png").write_bytes(content)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    rows = [{"prompt": "path", "image": "a.png"}, {"prompt": "uri", "image": uri}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = [prompt.meta["image"] for prompt in load_prompts(tmp_path / "p.jsonl")]
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    structs = [{"bytes": content, "path": "gone.png"}, {"bytes": None, "path": "a.png"}]
    parquet.write_table(pa.table({"text": ["in", "beside"], "image": structs}), tmp_path / "p.parquet")
    parquet.write_table(pa.table({"text": ["raw"], "image": [content]}), tmp_path / "r.parquet")
    for name in ("p.parquet", "r.parquet"):
        values += [prompt.meta["image"] for prompt in load_prompts(tmp_path / name)]
    assert all(np.array_equal(read_image("a", value), colours()) for value in values)
    path, of_uri, inside, beside, raw = (key_of("a prompt", value) for value in values)
    assert path == beside == str((tmp_path / "a.png").resolve())
    assert inside == raw and inside.startswith("sha256 ") and of_uri.startswith("sha256 ")
    # What a continued run compares follows the picture.
    other = encoded(colours().transpose(Image.Transpose.ROTATE_90))
    for value, changed in ((uri, uri[:-8] + "AAAAAAA="), (structs[0], structs[0] | {"bytes": other}), (content, other)):
        assert prompts_digest([Prompt("a", {"image": value})]) != prompts_digest([Prompt("a", {"image": changed})])


def test_all_pictures_are_read_before_a_run(tmp_path: Path) -> None:
    content = encoded(colours(), "JPEG")
    (tmp_path / "whole.jpg").write_bytes(content)
    (tmp_path / "cut.jpg").write_bytes(content[:-20])
    whole, cut = str(tmp_path / "whole.jpg"), str(tmp_path / "cut.jpg")
    check_images([("a", whole), ("b", whole), ("c", content)])
    with pytest.raises(ValueError, match=r"the image .*cut\.jpg, want a picture that can be read"):
        check_images([("a", whole), ("b", cut)])
    for value in (None, 3, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match=r'prompts: got "b" with image .*, want an `image` column with a path'):
            check_images([("a", whole), ("b", value)])
    for uri in ("data:image/png;base64", "data:image/png;base64,A", "data:,x"):
        with pytest.raises(ValueError, match=r"sha256 .*, want a picture that can be read"):
            check_images([("a", uri)])
