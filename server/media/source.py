"""Media as a client sends it: encoded bytes in a data URL, checked for size before they are decoded, named by digest.

The digest covers the encoded bytes and what they were sent as. It is how the worker is asked: bytes that it has seen
need no decoding at all.
"""

from __future__ import annotations

import binascii
import hashlib
from dataclasses import dataclass
from typing import Literal

from server.errors import InvalidMedia, InvalidRequest, UnsupportedParameter

Kind = Literal["image", "video"]
PREFIXES: dict[Kind, str] = {"image": "img_", "video": "vid_"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMedia:
    kind: Kind
    data: bytes
    digest: bytes
    # where it stands in the request, for the error that names it
    param: str

    @property
    def id(self) -> str:
        return media_id(self.kind, self.digest)


def media_id(kind: Kind, digest: bytes) -> str:
    """img_ or vid_ and the digest in 64 hexadecimal digits."""
    return PREFIXES[kind] + digest.hex()


def read_data_url(url: str, kind: Kind, *, max_bytes: int, param: str) -> EncodedMedia:
    """Raises `InvalidMedia` for bytes that are too many or no base64; `UnsupportedParameter` for another scheme."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() in ("http", "https"):
        raise UnsupportedParameter(f"{kind} URLs are not fetched: send the bytes as a data URL", param=param)
    if scheme.lower() != "data":
        raise InvalidRequest(f"a {kind} must be a data URL (data:{kind}/...;base64,...)", param=param)
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidRequest("the data URL is not of the form data:TYPE;base64,DATA", param=param)
    _check_type(header.split(";")[0].strip().lower(), kind, param)
    data = _decode(payload, max_bytes, param)
    return EncodedMedia(kind=kind, data=data, digest=source_digest(data, kind), param=param)


def source_digest(data: bytes, kind: Kind) -> bytes:
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=32, person=b"flmbynce-source")
    digest.update(data)
    return digest.digest()


def _check_type(media_type: str, kind: Kind, param: str) -> None:
    if media_type not in ("", "application/octet-stream") and not media_type.startswith(f"{kind}/"):
        raise InvalidRequest(f"the data URL says {media_type[:64]}, expected {kind}/...", param=param)


def _decode(payload: str, max_bytes: int, param: str) -> bytes:
    size = len(payload) * 3 // 4 - payload[-2:].count("=")
    if size > max_bytes:
        raise InvalidMedia(f"{size} bytes of media, the limit is {max_bytes}", param=param)
    try:
        data = binascii.a2b_base64(payload, strict_mode=True)
    except (binascii.Error, ValueError):
        raise InvalidMedia("the data URL's data is not valid base64", param=param) from None
    if not data:
        raise InvalidMedia("the data URL holds no data", param=param)
    return data
