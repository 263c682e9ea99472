"""Salts separate the engine's caches: a request reuses only entries of requests with the same salt.

The salt is part of the hash of each block of text, of the key of each media item, and of each compiled grammar. So the time
that a prompt takes reveals nothing about the prompts of others. Each tenant has its own salt, unless the operator lets
tenants share caches; a request may add another one (`cache_salt`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import msgspec

from model.prompt import EncodedPrompt
from server import wire
from server.media.source import EncodedMedia

# the kinds of salts: the `cache_salt` of a request never equals the salt of a tenant of that name
SaltKind = Literal["tenant", "request"]

NO_SALT = b""
SALT_BYTES = 16


def add_salt(salt: bytes, kind: SaltKind, name: str) -> bytes:
    """Return the salt that combines `salt` with the name of a tenant or the `cache_salt` of a request."""
    return hashlib.blake2b(name.encode(), key=salt, digest_size=SALT_BYTES, person=f"salt {kind}".encode()).digest()


def salted(request: wire.Request, salt: bytes) -> wire.Request:
    """Return a request whose prompt and media have a salt."""
    match request:
        case wire.Generate() | wire.Score() | wire.Inspect():
            return msgspec.structs.replace(request, prompt=salted_prompt(request.prompt, salt))
        case wire.Embed():
            return msgspec.structs.replace(request, media=salted_sources(request.media, salt))
    return request


def salted_prompt(prompt: EncodedPrompt, salt: bytes) -> EncodedPrompt:
    return replace(prompt, media=salted_sources(prompt.media, salt), salt=salt)


def salted_media(media: Mapping[bytes, EncodedMedia], salt: bytes) -> Mapping[bytes, EncodedMedia]:
    """Return media by their sources."""
    return {digest + salt: replace(item, digest=digest + salt) for digest, item in media.items()}


def salted_sources(digests: Iterable[bytes], salt: bytes) -> list[bytes]:
    """Return the sources of media, which are the worker's names for them."""
    return [digest + salt for digest in digests]
