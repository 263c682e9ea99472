"""The decode process without a process: each request has one reply."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from model.media import MediaLimits
from server.media import decoder
from server.media.decoder import LENGTH_BYTES, READY, Decode, Frames, Refused, decode_reply, frames_of, with_length
from server.media.source import Kind
from server.settings import ROOT
from tests.server.conftest import png
from tests.server.media.pools import VISION
from tests.server.media.videos import film


def test_an_image_is_one_frame() -> None:
    reply = frames_of(Decode(kind="image", data=png("red")), VISION, MediaLimits())
    assert isinstance(reply, Frames)
    assert (reply.shape, reply.size) == ((1, 12, 12, 3), (20, 10))


def test_the_size_is_that_of_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "PNG", exif=exif)
    reply = frames_of(Decode(kind="image", data=file.getvalue()), VISION, MediaLimits())
    assert isinstance(reply, Frames)
    assert reply.size == (10, 20)


def test_a_video_has_a_frame_per_second() -> None:
    reply = frames_of(Decode(kind="video", data=film(["red", "lime", "blue"])), VISION, MediaLimits())
    assert isinstance(reply, Frames)
    assert (reply.shape, reply.size) == ((3, 12, 12, 3), (32, 32))
    centres = np.frombuffer(reply.data, np.uint8).reshape(reply.shape)[:, 6, 6]
    assert centres.argmax(-1).tolist() == [0, 1, 2]


def test_media_that_exceed_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoder, "load_image", exhaust)
    reply = frames_of(Decode(kind="image", data=png()), VISION, MediaLimits())
    assert reply == Refused(message="decoding this image takes more memory than is allowed")


def test_an_image_sent_as_a_video_is_refused() -> None:
    reply = frames_of(Decode(kind="video", data=png()), VISION, MediaLimits())
    assert isinstance(reply, Refused)


def test_the_pixels_of_a_request_are_counted_over_all_frames() -> None:
    limits = MediaLimits(max_total_pixels=3 * 32 * 32)
    clip = film(["red", "lime", "blue"])
    whole = frames_of(Decode(kind="video", data=clip), VISION, limits)
    assert isinstance(whole, Frames)
    assert whole.num_pixels == 3 * 32 * 32
    message = "the media of this request have 3073 pixels up to this item, the limit is 3072"
    assert frames_of(Decode(kind="video", data=clip, num_pixels=1), VISION, limits) == Refused(
        message=message, too_many_pixels=True
    )
    image = frames_of(Decode(kind="image", data=png("red"), num_pixels=5), VISION, limits)
    assert isinstance(image, Frames)
    assert image.num_pixels == 20 * 10


DAMAGED: list[tuple[Kind, bytes]] = [
    ("image", b"\xff\xd8\xff" + bytes(40)),
    ("image", b"RIFF\0\0\0\0WEBPVP8X" + bytes(40)),
    ("image", b"GIF89a" + bytes(40)),
    ("image", png()[:40]),
    ("image", png()[:-30]),
    ("video", b"\0\0\0\x08ftyp" + bytes(40)),
    ("video", b"\x1aE\xdf\xa3" + bytes(40)),
    ("video", film(["red"]).replace(b"moov", b"moox")),
]


@pytest.mark.parametrize(("kind", "data"), DAMAGED, ids=map(str, range(len(DAMAGED))))
def test_a_refusal_has_no_text_of_a_library(kind: Kind, data: bytes) -> None:
    reply = frames_of(Decode(kind=kind, data=data), VISION, MediaLimits())
    assert isinstance(reply, Refused)
    assert reply.message.removeprefix(f"{kind} cannot be decoded: ") in (
        "its header is damaged, ends early, or has a variant that is not supported",
        "its data are damaged, or end early",
        "its data are damaged",
    )
    assert not reply.unexpected


def test_an_unexpected_error_is_a_refusal_that_names_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AttributeError("<_io.BytesIO object at 0x7f>")

    monkeypatch.setattr(decoder, "load_image", fail)
    reply = frames_of(Decode(kind="image", data=png()), VISION, MediaLimits())
    assert reply == Refused(message="this image cannot be decoded", unexpected="AttributeError")


def setup_with(max_memory_bytes: int) -> decoder.Setup:
    limits = dataclasses.asdict(MediaLimits())
    return decoder.Setup(
        vision=dataclasses.asdict(VISION), limits=limits, max_memory_bytes=max_memory_bytes, max_seconds=60
    )


def test_requests_are_answered_in_order_until_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    monkeypatch.setattr("os.nice", lambda _: 0)  # otherwise all later tests have this priority
    setup = setup_with(max_memory_bytes=1)
    requests = [Decode(kind="image", data=png()), Decode(kind="image", data=b"no")]
    source, sink = io.BytesIO(b"".join(map(with_length, [setup, *requests]))), io.BytesIO()
    decoder.serve(source, sink)
    sink.seek(0)
    assert sink.read(LENGTH_BYTES) == READY
    replies = []
    while length := sink.read(LENGTH_BYTES):
        replies.append(decode_reply.decode(sink.read(int.from_bytes(length, "little"))))
    assert [type(reply) for reply in replies] == [Frames, Refused]


def tiff(mode: str, compression: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert(mode).save(file, "TIFF", compression=compression)
    return file.getvalue()


def test_libraries_write_nothing_to_the_log() -> None:
    fax, colour = tiff("1", "group4"), tiff("RGB", "raw")
    damaged = fax[:500] + b"\x55" * 200 + fax[700:]
    num_samples = b"\x15\x01\x03\0\x01\0\0\0"
    too_many = colour.replace(num_samples + b"\x03\0", num_samples + b"\xff\xff")
    setup = setup_with(max_memory_bytes=2**31)
    requests = [Decode(kind="image", data=data) for data in (damaged, too_many)]
    process = subprocess.run(
        [sys.executable, "-m", "server.media.decoder"],
        input=b"".join(map(with_length, [setup, *requests])),
        capture_output=True,
        cwd=ROOT,
        check=True,
    )
    assert process.stderr == b""
    assert process.stdout.count(b"Refused") == 1
