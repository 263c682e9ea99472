"""Encodes segments of videos, and videos in containers that the server does not support, as MP4 in memory."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from evaluation.benchmarks.items import IMAGES, DataError, Item

FRAMES_PER_SECOND = 8
BITS_PER_SECOND = 8_000_000
# a frame with a wrong, enormous time would otherwise be preceded by copies without end
MAX_SECONDS = 3600.0
READ_BY_SERVER = {".mp4", ".webm", ".mkv"}


def media(item: Item) -> Path | bytes:
    """Return what is sent for an item: its file, or the bytes of a new video; raises DataError for a broken one."""
    if item.segment is None and item.media.suffix.lower() in READ_BY_SERVER | IMAGES:
        return item.media
    start, end = item.segment or (0.0, math.inf)
    try:
        video = encode(item.media, start, end)
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{item.media}: {error}") from None
    except OverflowError:  # the start is later than FFmpeg can count
        video = None
    if video is None:
        raise DataError(f"{item.media} has no frame from {start:g} to {end:g} s")
    return video


def encode(path: Path, start: float, end: float) -> bytes | None:
    """Return a segment of a video as MP4, with `FRAMES_PER_SECOND`; None if it has no frames.

    Its times count from the start of the video. Raises DataError if it is longer than `MAX_SECONDS`.
    """
    buffer, num_frames = io.BytesIO(), 0
    with av.open(path) as source, av.open(buffer, "w", format="mp4") as target:
        stream: Any = target.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.bit_rate = BITS_PER_SECOND
        origin = _origin(source)
        source.seek(int((origin + start) * av.time_base))
        for moment, frame in _timed(source):
            time = moment - origin
            if time >= end:
                break
            if time < start:
                continue
            if time - start > MAX_SECONDS:
                raise DataError(f"{path} is longer than {MAX_SECONDS:g} s")
            upright = _upright(frame)
            if num_frames == 0:
                stream.width, stream.height = upright.width - upright.width % 2, upright.height - upright.height % 2
            while start + num_frames / FRAMES_PER_SECOND <= time:
                picture = upright.reformat(stream.width, stream.height, format="yuv420p")
                picture.pts, picture.time_base = num_frames, Fraction(1, FRAMES_PER_SECOND)
                picture.pict_type = 0  # the encoder chooses it
                target.mux(stream.encode(picture))
                num_frames += 1
        if num_frames:
            target.mux(stream.encode(None))
    return buffer.getvalue() if num_frames else None


def _origin(source: av.container.InputContainer) -> float:
    """Return the time at which a video starts, which is not 0 in every file."""
    first = next((time for time, _ in _timed(source)), 0.0)
    return first if source.start_time is None else min(first, source.start_time / av.time_base)


def _timed(source: av.container.InputContainer) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield frames with their times; one that is later than the next frame's is wrong, and replaced by that one."""
    frames = source.decode(source.streams.video[0])
    frame = next(frames, None)
    while frame is not None:
        following = next(frames, None)
        time = frame.time or 0.0
        next_time = None if following is None else following.time
        yield (time if next_time is None else min(time, next_time)), frame
        frame = following


def _upright(frame: av.VideoFrame) -> av.VideoFrame:
    """Turn a frame as the header says, which the new video's does not; other angles than multiples of 90 are ignored."""
    turns, odd = divmod(frame.rotation, 90)
    if odd or not turns:
        return frame
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels, np.uint8))
