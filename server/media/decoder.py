"""The decode process turns encoded media into frames in isolation, so that a malicious file cannot harm the server.

It has a memory limit, holds a single media item, and ends if one takes too much processor time. Messages on its standard
streams are a length of four bytes, then msgpack. The first message is `Setup`, answered by an empty one; each `Decode` is
answered by `Frames` or `Refused`, one at a time, until the input ends.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import VisionConfig, from_dict
from model.media import MediaError, MediaLimits, PixelBudget, TooManyPixels, load_image, load_video, resize
from server.media.source import Kind

LENGTH_BYTES = 4
# the reply to `Setup`
READY = bytes(LENGTH_BYTES)
# With a niceness of 5, the worker and the API get three quarters of a busy processor.
NICENESS = 5


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a process; `max_seconds` are of processor time per media item."""

    vision: dict[str, Any]
    limits: dict[str, Any]
    max_memory_bytes: int
    max_seconds: float


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """A media item to decode, and the number of pixels that were decoded before for the same request."""

    kind: Kind
    data: bytes
    num_pixels: int = 0


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Decoded frames: uint8 RGB [F, h, w, 3], resized for the vision encoder.

    `size` is the original width and height of the first frame, `num_pixels` the pixels of all frames before resizing.
    """

    shape: tuple[int, int, int, int]
    data: bytes
    size: tuple[int, int] = (0, 0)
    num_pixels: int = 0


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why the media item is refused, for the client.

    `too_many_pixels`: the limit of all media of the request is exceeded. `unexpected` is the type of an unexpected error,
    for the log.
    """

    message: str
    too_many_pixels: bool = False
    unexpected: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_reply: msgspec.msgpack.Decoder[Frames | Refused] = msgspec.msgpack.Decoder(Frames | Refused)
decode_setup = msgspec.msgpack.Decoder(Setup)
decode_request = msgspec.msgpack.Decoder(Decode)


def with_length(message: msgspec.Struct) -> bytes:
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def frames_of(request: Decode, vision: VisionConfig, limits: MediaLimits) -> Frames | Refused:
    """Decode media, or refuse them. Any error of a decoder is caused by the media, and its text is not passed on."""
    try:
        return _decode(request, vision, limits)
    except MediaError as error:
        return Refused(message=str(error), too_many_pixels=isinstance(error, TooManyPixels))
    except MemoryError:
        return Refused(message=f"decoding this {request.kind} takes more memory than is allowed")
    except Exception as error:
        return Refused(message=f"this {request.kind} cannot be decoded", unexpected=type(error).__name__)


def _decode(request: Decode, vision: VisionConfig, limits: MediaLimits) -> Frames:
    budget = PixelBudget(limits.max_total_pixels, request.num_pixels)
    load = load_video if request.kind == "video" else _load_single
    sizes, resized = [], []
    for image in load(request.data, limits, budget):
        sizes.append(image.size)
        resized.append(resize(image, vision))
    frames: NDArray[np.uint8] = np.stack(resized)
    num_frames, height, width, channels = frames.shape
    return Frames(
        shape=(num_frames, height, width, channels),
        data=frames.tobytes(),
        size=sizes[0],
        num_pixels=budget.used - request.num_pixels,
    )


def _load_single(data: bytes, limits: MediaLimits, budget: PixelBudget) -> Iterator[Image.Image]:
    yield load_image(data, limits, budget)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    setup = decode_setup.decode(_read(source) or b"")
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (setup.max_memory_bytes, setup.max_memory_bytes))
    vision: VisionConfig = from_dict(VisionConfig, setup.vision, "vision")
    limits: MediaLimits = from_dict(MediaLimits, setup.limits, "limits")
    _send(sink, READY)
    while (body := _read(source)) is not None:
        request = decode_request.decode(body)
        # without a handler, the signal ends the process, also while native code runs
        signal.setitimer(signal.ITIMER_PROF, setup.max_seconds)
        reply = frames_of(request, vision, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sink, with_length(reply))


def _send(sink: BinaryIO, message: bytes) -> None:
    sink.write(message)
    sink.flush()


def _read(source: BinaryIO) -> bytes | None:
    length = source.read(LENGTH_BYTES)
    return source.read(int.from_bytes(length, "little")) if len(length) == LENGTH_BYTES else None


def silence_libraries() -> None:
    """Discard messages of libraries about invalid files, with which a client could fill the log; Python's errors stay."""
    warnings.simplefilter("ignore")
    logging.disable()
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes to it, which PIL cannot turn off


if __name__ == "__main__":
    silence_libraries()
    serve(sys.stdin.buffer, sys.stdout.buffer)
