"""The decode process turns encoded media into frames in isolation, so that a malicious file cannot harm the server.

It has a memory limit, can be killed, and holds a single media item. Messages on its standard streams are a length of
four bytes, then msgpack. The first message is `Setup`; each `Decode` is answered by `Frames` or `Refused`, one at a
time, until the input ends.
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
    """Decoded frames: uint8 RGB [F, h, w, 3], resized for the vision encoder.

    `size` is the original width and height of the first frame.
    """

    shape: tuple[int, int, int, int]
    data: bytes
    size: tuple[int, int] = (0, 0)


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    message: str


encode = msgspec.msgpack.Encoder().encode
decode_reply: msgspec.msgpack.Decoder[Frames | Refused] = msgspec.msgpack.Decoder(Frames | Refused)
decode_setup = msgspec.msgpack.Decoder(Setup)
decode_request = msgspec.msgpack.Decoder(Decode)


def with_length(message: msgspec.Struct) -> bytes:
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def frames_of(request: Decode, vision: VisionConfig, limits: MediaLimits) -> Frames | Refused:
    """Decode media. Media that exceed a limit or the memory are refused.

    Any other error is a bug and ends the process.
    """
    sizes, resized = [], []
    try:
        images = [load_image(request.data, limits)] if request.kind == "image" else load_video(request.data, limits)
        for image in images:
            sizes.append(image.size)
            resized.append(resize(image, vision))
        frames: NDArray[np.uint8] = np.stack(resized)
    except MediaError as error:
        return Refused(message=str(error))
    except MemoryError:
        return Refused(message=f"decoding this {request.kind} takes more memory than is allowed")
    num_frames, height, width, channels = frames.shape
    return Frames(shape=(num_frames, height, width, channels), data=frames.tobytes(), size=sizes[0])


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    setup = decode_setup.decode(_read(source) or b"")
    resource.setrlimit(resource.RLIMIT_AS, (setup.max_memory_bytes, setup.max_memory_bytes))
    vision: VisionConfig = from_dict(VisionConfig, setup.vision, "vision")
    limits: MediaLimits = from_dict(MediaLimits, setup.limits, "limits")
    while (body := _read(source)) is not None:
        sink.write(with_length(frames_of(decode_request.decode(body), vision, limits)))
        sink.flush()


def _read(source: BinaryIO) -> bytes | None:
    length = source.read(LENGTH_BYTES)
    return source.read(int.from_bytes(length, "little")) if len(length) == LENGTH_BYTES else None


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
