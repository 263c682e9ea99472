"""Parts as they travel: what a path, bytes, a PIL image and a URL become."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from flamboyance_client import end_of_chunk, image, shot, text, video
from flamboyance_client.prompt import Media, to_wire

SIGNED = {
    "image/png": b"\x89PNG\r\n\x1a\nrest",
    "image/jpeg": b"\xff\xd8\xff\xe0rest",
    "image/gif": b"GIF89arest",
    "image/webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
    "video/x-msvideo": b"RIFF\x10\x00\x00\x00AVI LIST",
    "video/mp4": b"\x00\x00\x00\x20ftypisom",
    "image/avif": b"\x00\x00\x00\x20ftypavif",
    "video/webm": b"\x1a\x45\xdf\xa3rest",
    "application/octet-stream": b"nothing known",
}


def content(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data, validate=True)


def sent(source: Media) -> tuple[str, bytes]:
    return content(image(source)["image_url"]["url"])


@pytest.mark.parametrize(("kind", "data"), SIGNED.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_bytes_are_known_by_their_signature(kind: str, data: bytes) -> None:
    assert sent(data) == (kind, data)


def test_the_signature_wins_over_the_file_name(tmp_path: Path) -> None:
    file = tmp_path / "wrong.gif"
    file.write_bytes(SIGNED["image/png"])
    assert sent(file) == ("image/png", SIGNED["image/png"])
    assert sent(str(file)) == ("image/png", SIGNED["image/png"])


def test_the_file_name_helps_where_there_is_no_signature(tmp_path: Path) -> None:
    file = tmp_path / "clip.mpeg"
    file.write_bytes(b"nothing known")
    assert content(video(file)["video_url"]["url"]) == ("video/mpeg", b"nothing known")


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "http://example.org/a.png", "https://example.org/a.png"])
def test_a_url_stays_a_url(url: str) -> None:
    assert image(url)["image_url"]["url"] == url
    assert video(url)["video_url"]["url"] == url


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P"])
def test_a_pil_image_keeps_every_pixel(mode: str) -> None:
    original = Image.effect_noise((7, 5), 90).convert(mode)
    kind, data = sent(original)
    assert kind == "image/png"
    returned = Image.open(io.BytesIO(data))
    assert (returned.mode, returned.tobytes()) == (original.mode, original.tobytes())


@pytest.mark.parametrize("mode", ["CMYK", "HSV", "F"])
def test_a_pil_image_that_png_cannot_hold_is_sent_as_rgb(mode: str) -> None:
    original = Image.new(mode, (4, 3))
    returned = Image.open(io.BytesIO(sent(original)[1]))
    assert (returned.mode, returned.tobytes()) == ("RGB", original.convert("RGB").tobytes())


def test_nothing_is_not_a_media() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        image(b"")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        image(tmp_path / "none.png")


def test_a_shot_is_an_image_its_text_and_an_end() -> None:
    data = SIGNED["image/png"]
    assert shot(data, "A cat.") == [image(data), text("A cat."), end_of_chunk()]
    assert shot(data, "A cat.", end=False) == [image(data), text("A cat.")]


def test_a_string_in_a_list_is_a_text_part() -> None:
    assert to_wire("whole") == "whole"
    assert to_wire(["a", image("data:,"), end_of_chunk()]) == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "end_of_chunk"},
    ]


def test_token_ids_are_a_prompt() -> None:
    assert to_wire([5, 6]) == [5, 6]
