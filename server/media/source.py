"""Media as encoded bytes, identified by digest, and the data URLs that carry them.

The digest covers the encoded bytes and the kind that they were sent as. Requests to the worker name media
by digest, so bytes that it has seen before need no decoding.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
from collections.abc import Callable
from typing import Literal

from server.errors import InvalidMedia, InvalidRequest

Kind = Literal["image", "video"]
PREFIXES: dict[Kind, str] = {"image": "img_", "video": "vid_"}


class EncodedMedia:
    """An image or video of a request.

    `param` is its path in the request, for error messages. `data` is the bytes, or a function that reads them from the
    store: most requests never need them.
    """

    def __init__(self, *, kind: Kind, data: bytes | Callable[[], bytes], digest: bytes, param: str) -> None:
        self.kind: Kind = kind
        self.digest = digest
        self.param = param
        self.num_bytes_in_memory = len(data) if isinstance(data, bytes) else 0
        self._data = data

    @property
    def id(self) -> str:
        return media_id(self.kind, self.digest)

    @property
    def is_in_memory(self) -> bool:
        """True if the bytes are in memory."""
        return isinstance(self._data, bytes)

    @property
    def data(self) -> bytes:
        """The bytes. Blocks unless they are in memory. Raises `MediaNotFound` if they have been deleted."""
        return self._data if isinstance(self._data, bytes) else self._data()

    async def read(self) -> bytes:
        """Return the bytes without blocking. Raises `MediaNotFound` if they have been deleted."""
        return self.data if self.is_in_memory else await asyncio.to_thread(lambda: self.data)


def media_id(kind: Kind, digest: bytes) -> str:
    """Return the id: `img_` or `vid_`, and the digest in 64 hexadecimal digits."""
    return PREFIXES[kind] + digest.hex()


def kind_of(media_id: str) -> Kind | None:
    """Return the kind that the id's prefix states, None for any other text."""
    return next((kind for kind, prefix in PREFIXES.items() if media_id.startswith(prefix)), None)


def digest_of(media_id: str) -> bytes:
    return bytes.fromhex(media_id.partition("_")[2])


def source_digest(data: bytes, kind: Kind) -> bytes:
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=32, person=b"flmbynce-source")
    digest.update(data)
    return digest.digest()


def encoded(data: bytes, kind: Kind, param: str) -> EncodedMedia:
    return EncodedMedia(kind=kind, data=data, digest=source_digest(data, kind), param=param)


def check_size(size: int, max_bytes: int, param: str | None) -> None:
    """Raise `InvalidMedia` for too many bytes."""
    if size > max_bytes:
        raise InvalidMedia(f"{size} bytes of media, the limit is {max_bytes}", param=param)


def read_data_url(url: str, kind: Kind, *, max_bytes: int, param: str) -> EncodedMedia:
    """Decode a data URL.

    Raises `InvalidRequest` if it is not a data URL of this kind, `InvalidMedia` for too many bytes or bad base64.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise InvalidRequest(f"a {kind} must be a data URL (data:{kind}/...;base64,...)", param=param)
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidRequest("the data URL must have the form data:TYPE;base64,DATA", param=param)
    media_type = header.split(";")[0].strip().lower()
    if media_type not in ("", "application/octet-stream") and not media_type.startswith(f"{kind}/"):
        raise InvalidRequest(f"the data URL has the type {media_type[:64]}, expected {kind}/...", param=param)
    return encoded(from_base64(payload, max_bytes, param), kind, param)


def from_base64(payload: str, max_bytes: int, param: str) -> bytes:
    """Decode base64. Raises `InvalidMedia`; a payload that is too long is not decoded."""
    check_size(len(payload) * 3 // 4 - payload[-2:].count("="), max_bytes, param)
    try:
        data = binascii.a2b_base64(payload, strict_mode=True)
    except (binascii.Error, ValueError):
        raise InvalidMedia("the media's data is not valid base64", param=param) from None
    if not data:
        raise InvalidMedia("the media's data is empty", param=param)
    return data
