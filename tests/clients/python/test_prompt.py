"""Tests of prompt parts as they are sent, from paths, bytes, PIL images and URLs."""

from __future__ import annotations

import base64
import io
import mimetypes
from pathlib import Path
from urllib.parse import urlsplit

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
    "application/octet-stream": b"unknown format",
}


def decode(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data, validate=True)


def decoded_image(source: Media) -> tuple[str, bytes]:
    return decode(image(source)["image_url"]["url"])


@pytest.mark.parametrize(("kind", "data"), SIGNED.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_signature_of_bytes_gives_their_type(kind: str, data: bytes) -> None:
    if kind.startswith("video/"):
        assert decode(video(data)["video_url"]["url"]) == (kind, data)
    else:
        assert decoded_image(data) == (kind, data)


def test_the_signature_takes_precedence_over_the_file_name(tmp_path: Path) -> None:
    file = tmp_path / "wrong.gif"
    file.write_bytes(SIGNED["image/png"])
    assert decoded_image(file) == ("image/png", SIGNED["image/png"])
    assert decoded_image(str(file)) == ("image/png", SIGNED["image/png"])


def test_the_file_name_gives_the_type_of_bytes_without_a_signature(tmp_path: Path) -> None:
    file = tmp_path / "clip.mpeg"
    file.write_bytes(b"unknown format")
    assert decode(video(file)["video_url"]["url"]) == ("video/mpeg", b"unknown format")


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "http://example.org/a.png", "https://example.org/a.png"])
def test_a_url_is_sent_unchanged(url: str) -> None:
    assert image(url)["image_url"]["url"] == url
    assert video(url)["video_url"]["url"] == url


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P"])
def test_a_pil_image_keeps_every_pixel(mode: str) -> None:
    original = Image.effect_noise((7, 5), 90).convert(mode)
    kind, data = decoded_image(original)
    assert kind == "image/png"
    returned = Image.open(io.BytesIO(data))
    assert (returned.mode, returned.tobytes()) == (original.mode, original.tobytes())


def photograph(**options: object) -> bytes:
    """Return a photograph of 7 x 5 pixels, which is stored sideways."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.effect_noise((5, 7), 90).save(stream, "PNG", exif=exif, **options)
    return stream.getvalue()


def test_a_pil_image_is_sent_upright() -> None:
    data = photograph()
    stored = Image.open(io.BytesIO(data))
    returned = Image.open(io.BytesIO(decoded_image(Image.open(io.BytesIO(data)))[1]))
    assert returned.size == (7, 5)
    assert returned.tobytes() == stored.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert returned.getexif().get(0x0112) is None


def test_a_pil_image_whose_orientation_cannot_be_read_is_sent_as_it_is() -> None:
    original = Image.effect_noise((7, 5), 90)
    original.info["exif"] = b"Exif\0\0no table"
    assert Image.open(io.BytesIO(decoded_image(original)[1])).tobytes() == original.tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_a_pil_image_of_16_bits_keeps_them(mode: str) -> None:
    original = Image.new(mode, (4, 3), 0x1234)
    assert Image.open(io.BytesIO(decoded_image(original)[1])).getpixel((2, 2)) == 0x1234


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_pil_image_that_states_no_white_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"a PIL image of mode {mode} has no defined white"):
        image(Image.new(mode, (4, 3)))


@pytest.mark.parametrize("mode", ["CMYK", "HSV"])
def test_a_pil_image_that_png_cannot_hold_is_sent_as_rgb(mode: str) -> None:
    original = Image.new(mode, (4, 3))
    returned = Image.open(io.BytesIO(decoded_image(original)[1]))
    assert (returned.mode, returned.tobytes()) == ("RGB", original.convert("RGB").tobytes())


def test_empty_media_raise() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        image(b"")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        image(tmp_path / "missing.png")


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


@pytest.mark.parametrize("name", ["cat.png", "pictures/cat.JPG", "https://a.org/cat.webp", "clip.mp4"])
def test_the_name_of_a_file_is_no_text(name: str) -> None:
    for prompt in (name, [name, "This is a"]):
        with pytest.raises(ValueError, match=r"is the name of a file: (image|video)\("):
            to_wire(prompt)
    assert to_wire([text(name)]) == [text(name)]


def test_a_text_need_not_be_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    def guess_type(url: str) -> tuple[str | None, None]:
        urlsplit(url)  # as Python does since 3.12
        return types.get(Path(url).suffix), None

    types = {".png": "image/png"}
    monkeypatch.setattr(mimetypes, "guess_type", guess_type)
    for value in ("//[1] see", "http://[x is broken", "data://[1] see"):
        assert to_wire(value) == value
    for value in ("https://a.org/[1]/cat.png", "data:image/png;base64,AA/A"):
        with pytest.raises(ValueError, match="is the name of a file"):
            to_wire(value)


def test_a_text_may_mention_a_file(tmp_path: Path) -> None:
    assert to_wire("Describe cat.png") == "Describe cat.png"
    (tmp_path / "my cat.png").touch()
    with pytest.raises(ValueError, match="is the name of a file"):
        to_wire([str(tmp_path / "my cat.png")])


def test_token_ids_are_a_prompt() -> None:
    assert to_wire([5, 6]) == [5, 6]


def test_a_uuid_names_a_media_item_or_stands_for_it() -> None:
    assert image(b"GIF89a", uuid="a")["uuid"] == video(b"GIF89a", uuid="a")["uuid"] == "a"
    assert image(uuid="a") == {"type": "image_url", "uuid": "a"}
    assert video(uuid="a") == {"type": "video_url", "uuid": "a"}
    assert "uuid" not in image(b"GIF89a")
    for function in (image, video):
        with pytest.raises(ValueError, match="uuid"):
            function()
