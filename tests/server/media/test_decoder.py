"""The decode process without a process: each request has one reply."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from model.media import MediaLimits
from server.media import decoder
from server.media.decoder import LENGTH_BYTES, Decode, Frames, Refused, decode_reply, frames_of, with_length
from tests.server.conftest import png
from tests.server.media.test_pool import VISION
from tests.server.media.videos import film


def test_an_image_is_one_frame() -> None:
    reply = frames_of(Decode(kind="image", data=png("red")), VISION, MediaLimits())
    assert isinstance(reply, Frames)
    assert (reply.shape, reply.size) == ((1, 12, 12, 3), (20, 10))


def test_a_video_has_a_frame_per_second() -> None:
    reply = frames_of(Decode(kind="video", data=film(["red", "lime", "blue"])), VISION, MediaLimits())
    assert isinstance(reply, Frames)
    assert (reply.shape, reply.size) == ((3, 12, 12, 3), (32, 32))
    centres = np.frombuffer(reply.data, np.uint8).reshape(reply.shape)[:, 6, 6]
    assert centres.argmax(-1).tolist() == [0, 1, 2]


def test_media_that_exceed_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(data: bytes, limits: MediaLimits) -> None:
        raise MemoryError

    monkeypatch.setattr(decoder, "load_image", exhaust)
    reply = frames_of(Decode(kind="image", data=png()), VISION, MediaLimits())
    assert reply == Refused(message="decoding this image takes more memory than is allowed")


def test_an_image_sent_as_a_video_is_refused() -> None:
    reply = frames_of(Decode(kind="video", data=png()), VISION, MediaLimits())
    assert isinstance(reply, Refused)


def test_requests_are_answered_in_order_until_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    setup = decoder.Setup(
        vision=dataclasses.asdict(VISION), limits=dataclasses.asdict(MediaLimits()), max_memory_bytes=1
    )
    requests = [Decode(kind="image", data=png()), Decode(kind="image", data=b"no")]
    source, sink = io.BytesIO(b"".join(map(with_length, [setup, *requests]))), io.BytesIO()
    decoder.serve(source, sink)
    sink.seek(0)
    replies = []
    while length := sink.read(LENGTH_BYTES):
        replies.append(decode_reply.decode(sink.read(int.from_bytes(length, "little"))))
    assert [type(reply) for reply in replies] == [Frames, Refused]
