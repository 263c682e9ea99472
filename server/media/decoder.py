"""A process that turns encoded media into frames, so that no picture can harm the server: it has a memory limit, it can
be killed, and it holds nothing but one picture.

Messages on its standard streams: a length of four bytes, then msgpack. The first one is `Setup`; then `Decode` is
answered by `Frames` or `Refused`, one at a time, until the input ends.
"""

from __future__ import annotations

import resource
import sys
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.config import VisionConfig, from_dict
from model.media import MediaError, MediaLimits, load_image, load_video, resize
from server.media.source import Kind

LENGTH_BYTES = 4


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    vision: dict[str, Any]
    limits: dict[str, Any]
    max_memory_bytes: int


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    kind: Kind
    data: bytes


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """uint8 RGB of shape [F, h, w, 3], resized for the vision encoder. `size`: width and height before, of the first."""

    shape: tuple[int, int, int, int]
    data: bytes
    size: tuple[int, int] = (0, 0)


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    message: str


encode = msgspec.msgpack.Encoder().encode
decode_reply: msgspec.msgpack.Decoder[Frames | Refused] = msgspec.msgpack.Decoder(Frames | Refused)
decode_setup = msgspec.msgpack.Decoder(Setup)
decode_order = msgspec.msgpack.Decoder(Decode)


def with_length(message: msgspec.Struct) -> bytes:
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def frames_of(order: Decode, vision: VisionConfig, limits: MediaLimits) -> Frames | Refused:
    """A picture that breaks a limit or the memory is refused; anything else is a bug and ends the process."""
    sizes, squares = [], []
    try:
        for picture in [load_image(order.data, limits)] if order.kind == "image" else load_video(order.data, limits):
            sizes.append(picture.size)
            squares.append(resize(picture, vision))
        frames: NDArray[np.uint8] = np.stack(squares)
    except MediaError as error:
        return Refused(message=str(error))
    except MemoryError:
        return Refused(message=f"decoding this {order.kind} takes more memory than is allowed")
    count, height, width, channels = frames.shape
    return Frames(shape=(count, height, width, channels), data=frames.tobytes(), size=sizes[0])


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    setup = decode_setup.decode(_read(source) or b"")
    resource.setrlimit(resource.RLIMIT_AS, (setup.max_memory_bytes, setup.max_memory_bytes))
    vision: VisionConfig = from_dict(VisionConfig, setup.vision, "vision")
    limits: MediaLimits = from_dict(MediaLimits, setup.limits, "limits")
    while (body := _read(source)) is not None:
        sink.write(with_length(frames_of(decode_order.decode(body), vision, limits)))
        sink.flush()


def _read(source: BinaryIO) -> bytes | None:
    length = source.read(LENGTH_BYTES)
    return source.read(int.from_bytes(length, "little")) if len(length) == LENGTH_BYTES else None


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
