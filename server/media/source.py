"""Media as encoded bytes, identified by digest, and the data URLs that contain them.

The digest covers the encoded bytes and the kind (image or video) as which they were sent. Requests to the worker refer to
media by digest, so known bytes need no decoding.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pybase64

from server.errors import InvalidMedia, InvalidRequest

# of a digest, after which the worker looks for the salt
DIGEST_BYTES = 32
# characters of a data URL that is decoded in a thread
LARGE_URL = 2**16

Kind = Literal["image", "video"]
PREFIXES: dict[Kind, str] = {"image": "img_", "video": "vid_"}


@dataclass(slots=True, kw_only=True, eq=False)
class EncodedMedia:
    """An image or video of a request.

    `source` is its `num_bytes` bytes, or a function that reads them from the store or from a file: most requests never
    need them. `num_bytes` is 0 for an example of a support set, which is not looked up in the store.
    `digest` has DIGEST_BYTES, and then the salt, if the engine's client has added one. `param` is its path in the request,
    for error messages. `is_stored` is true for one in the media store.
    """

    kind: Kind
    source: bytes | Callable[[], bytes]
    digest: bytes
    param: str
    num_bytes: int = 0
    is_stored: bool = False

    @property
    def id(self) -> str:
        """`img_` or `vid_`, and the digest in 64 hexadecimal digits."""
        return PREFIXES[self.kind] + self.digest[:DIGEST_BYTES].hex()

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self.source, bytes)

    @property
    def data(self) -> bytes:
        """The bytes. Blocks unless they are in memory. Raises `MediaNotFound` if they have been deleted."""
        return self.source if isinstance(self.source, bytes) else self.source()

    async def read(self) -> bytes:
        """Return the bytes without blocking. Raises `MediaNotFound` if they have been deleted."""
        return self.data if self.is_in_memory else await asyncio.to_thread(lambda: self.data)


def kind_of(media_id: str) -> Kind | None:
    """Return the kind from the prefix of an id, None for any other text."""
    return next((kind for kind, prefix in PREFIXES.items() if media_id.startswith(prefix)), None)


def digest_of(media_id: str) -> bytes:
    return bytes.fromhex(media_id.partition("_")[2])


def begin_digest(kind: Kind) -> hashlib.blake2b:
    """Return the digest of a media item before its first byte."""
    return hashlib.blake2b(kind.encode() + b"\0", digest_size=DIGEST_BYTES, person=b"flmbynce-source")


def encoded(data: bytes, kind: Kind, param: str) -> EncodedMedia:
    digest = begin_digest(kind)
    digest.update(data)
    return EncodedMedia(kind=kind, source=data, num_bytes=len(data), digest=digest.digest(), param=param)


def read_data_url(url: str, kind: Kind, *, max_bytes: int, param: str) -> EncodedMedia:
    """Decode a URL whose scheme is `data`.

    Raises `InvalidRequest` for another form or kind than `data:KIND/...;base64,...`, `InvalidMedia` for too many bytes or
    bad base64.
    """
    rest = url.partition(":")[2]
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidRequest("the data URL must have the form data:TYPE;base64,DATA", param=param)
    media_type = header.split(";")[0].strip().lower()
    if media_type not in ("", "application/octet-stream") and not media_type.startswith(f"{kind}/"):
        raise InvalidRequest(f"the data URL has the type {media_type[:64]}, expected {kind}/...", param=param)
    if (size := len(payload) * 3 // 4 - payload[-2:].count("=")) > max_bytes:
        raise too_large(size, max_bytes, param)
    try:
        data = _decoded(payload)
    except ValueError:
        hint = ": leave out data:TYPE;base64, or send the whole as a url" if payload.startswith("data:") else ""
        raise InvalidMedia(f"the media's data is not valid base64{hint}", param=param) from None
    if not data:
        raise InvalidMedia("the media's data is empty", param=param)
    return encoded(data, kind, param)


def _decoded(payload: str) -> bytes:
    """Decode base64; superfluous padding at the end is accepted. Raises `ValueError`.

    pybase64 is twenty times as fast, but releases the interpreter's lock. On the event loop, it would wait for milliseconds
    to get the lock back.
    """
    if payload.find("=", 0, -2) >= 0:
        raise ValueError("base64 goes on after its end")
    if len(payload) < LARGE_URL:
        return binascii.a2b_base64(payload, strict_mode=True)
    unpadded = payload.rstrip("=")
    return pybase64.b64decode(payload if len(unpadded) % 4 else unpadded, validate=True)


def too_large(size: int, max_bytes: int, param: str) -> InvalidMedia:
    """Return the error of a file that exceeds the limit of the settings."""
    return InvalidMedia(f"the file has {size:,} bytes, the limit is {_mib(max_bytes)} (max_media_mb)", param=param)


def too_large_together(size: int, max_bytes: int, param: str) -> InvalidMedia:
    """Return the error of a request whose media exceed the limit of a body."""
    message = f"the media of the request have {size:,} bytes, the limit is {_mib(max_bytes)} (max_body_mb)"
    return InvalidMedia(message, param=param)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:g} MiB"
