"""Sampling of a video's frames by their times, also where these are irregular or wrong."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from model.media import MediaLimits, load_video

LIMITS = MediaLimits()


def times_of(moments: list[Fraction], time_base: Fraction, limits: MediaLimits = LIMITS) -> list[Fraction]:
    """Return the times of the frames that are sampled from a video with frames at these times."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuv420p", time_base
        stream.codec_context.time_base = time_base
        for i, moment in enumerate(moments):
            picture = av.VideoFrame.from_image(numbered(i))
            picture.pts, picture.time_base = int(moment / time_base), time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return [moments[number_of(frame)] for frame in load_video(buffer.getvalue(), limits)]


def numbered(number: int) -> Image.Image:
    """Return an image that shows the bits of a number as columns."""
    return Image.fromarray(np.array([[255 * (number >> x // 8 & 1) for x in range(64)]] * 48, dtype=np.uint8))


def number_of(picture: Image.Image) -> int:
    columns = np.asarray(picture.convert("L")).reshape(48, 8, 8).mean((0, 2))
    return sum(1 << bit for bit in range(8) if columns[bit] > 128)


def test_only_the_first_frame_of_each_second_is_sampled() -> None:
    third = Fraction(1, 3)  # a third of a second later, where rounded seconds would be 0.9999... after the first
    assert times_of([third + Fraction(i, 10) for i in range(35)], Fraction(1, 30)) == [third + i for i in range(4)]
    # 30000/1001 frames a second, as television has: none begins with a second, the next one does
    television = [Fraction(1001 * i, 30000) for i in range(62)]
    assert times_of(television, Fraction(1, 30000)) == [television[0], television[30], television[60]]


def test_after_a_gap_a_frame_counts_once() -> None:
    moments = [Fraction(n, 10) for n in (0, 3, 42, 43, 44, 45, 51, 52, 60)]
    assert times_of(moments, Fraction(1, 10)) == [Fraction(n, 10) for n in (0, 42, 51, 60)]


@pytest.mark.parametrize(("rate", "expected"), [(0.5, [0, 2, 4]), (2.0, [Fraction(n, 2) for n in range(10)])])
def test_periods_may_be_longer_or_shorter(rate: float, expected: list[Fraction]) -> None:
    moments = [Fraction(n, 10) for n in range(50)]
    assert times_of(moments, Fraction(1, 10), MediaLimits(frames_per_second=rate)) == expected


def with_composition_offsets(offsets: list[int]) -> bytes:
    """Return an MP4 without an edit list, with a frame each second whose time is moved by an offset, in seconds."""
    buffer = io.BytesIO()
    options = {"use_editlist": "0", "video_track_timescale": "1000"}
    with av.open(buffer, mode="w", format="mp4", options=options) as container:
        stream: Any = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.codec_context.gop_size = 64, 48, 1
        for i, _ in enumerate(offsets):
            picture = av.VideoFrame.from_image(numbered(i))
            picture.pts, picture.time_base = i, Fraction(1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    data = buffer.getvalue()
    entries = b"".join(struct.pack(">Ii", 1, 1000 * offset) for offset in offsets)
    table = struct.pack(">I4sII", 16 + len(entries), b"ctts", 1 << 24, len(offsets)) + entries
    moved = bytearray(data.replace(before := data[data.index(b"stts") - 4 :], table + before))
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        (size,) = struct.unpack_from(">I", moved, start := moved.index(box) - 4)
        struct.pack_into(">I", moved, start, size + len(table))
    return bytes(moved)


@pytest.mark.parametrize(
    ("first", "expected"), [(0, [0, 1, 2, 3, 4]), (10, [0, 2, 3, 4]), (10**6, [0, 2, 3, 4]), (-10, [0, 1, 2, 3, 4])]
)
def test_a_wrong_time_of_the_first_frame_hides_no_later_second(first: int, expected: list[int]) -> None:
    data = with_composition_offsets([first, 0, 0, 0, 0])
    assert [number_of(frame) for frame in load_video(data, LIMITS)] == expected
