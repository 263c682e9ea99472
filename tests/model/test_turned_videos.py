"""Frames of a video are turned as its track header says: phones store them as the sensor reads them."""

from __future__ import annotations

import io
import struct
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from model.media import MediaLimits, load_video

ONE, MINUS_ONE, LAST = 1 << 16, -1 << 16, 1 << 30
# (a, b, c, d) of ISO 14496-12: a pixel (x, y), with y downwards, is shown at (a x + c y, b x + d y)
MATRICES = {
    "as stored": (ONE, 0, 0, ONE),
    "clockwise": (0, ONE, MINUS_ONE, 0),
    "upside down": (MINUS_ONE, 0, 0, MINUS_ONE),
    "counterclockwise": (0, MINUS_ONE, ONE, 0),
    "by an odd angle": (ONE // 2, ONE // 2, MINUS_ONE // 2, ONE // 2),
}


def matrix(a: int, b: int, c: int, d: int) -> bytes:
    return struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, LAST)


def video(turn: str) -> bytes:
    """Return a video of a frame of 64 x 48, whose left half is white, with the matrix of its track replaced."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 255
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    data = buffer.getvalue()
    identity = matrix(*MATRICES["as stored"])
    assert data.count(identity) == 2  # of the film and of its track, which comes last
    head, _, tail = data.rpartition(identity)
    return head + matrix(*MATRICES[turn]) + tail


def white_side(frame: Image.Image) -> str:
    """Return the side of a frame that is white."""
    pixels = np.asarray(frame.convert("L"), np.float32)
    height, width = pixels.shape
    sides = {
        "left": pixels[:, : width // 2],
        "right": pixels[:, width // 2 :],
        "top": pixels[: height // 2],
        "bottom": pixels[height // 2 :],
    }
    return max(sides, key=lambda side: float(sides[side].mean()))


@pytest.mark.parametrize(
    ("turn", "side", "size"),
    [
        ("as stored", "left", (64, 48)),
        ("clockwise", "top", (48, 64)),
        ("upside down", "right", (64, 48)),
        ("counterclockwise", "bottom", (48, 64)),
        ("by an odd angle", "left", (64, 48)),
    ],
)
def test_a_video_is_shown_upright(turn: str, side: str, size: tuple[int, int]) -> None:
    (frame,) = load_video(video(turn), MediaLimits())
    assert (white_side(frame), frame.size) == (side, size)
