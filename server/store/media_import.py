"""Brings the media of new examples into the store: looked at, leased, then stored, so that they may be referred to.

Only the transaction that refers to them gives the leases back. Whoever dies before leaves bytes that a sweep removes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.media.store import MediaStore, not_found
from server.store import media_references as media_references
from server.store.database import Database

# looked at side by side: the first that is no picture spares the rest
PORTION = 16


class MediaDecoder(Protocol):
    async def decode(self, media: EncodedMedia) -> Frames: ...


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What decoding a media has told: width and height of its first frame, and how many there are."""

    size: tuple[int, int] | None = None
    num_frames: int | None = None


class MediaImport:
    """Media go by their id. `decoder`: None: they are stored unseen."""

    def __init__(self, database: Database, store: MediaStore, decoder: MediaDecoder | None) -> None:
        self._database = database
        self._store = store
        self._decoder = decoder

    async def inspect(self, media: Mapping[str, EncodedMedia]) -> dict[str, MediaInfo]:
        """Looks of those that nobody has looked at yet. Raises `InvalidMedia` for what is no picture."""
        if self._decoder is None:
            return {}
        unseen = await asyncio.to_thread(self._unseen, media)
        looks: dict[str, MediaInfo] = {}
        for start in range(0, len(unseen), PORTION):
            some = unseen[start : start + PORTION]
            found = await asyncio.gather(*(self._decoder.decode(one) for one in some))
            looks.update((one.id, MediaInfo(f.size, f.shape[0])) for one, f in zip(some, found, strict=True))
        return looks

    async def store(self, media: Mapping[str, EncodedMedia], looks: Mapping[str, MediaInfo]) -> str:
        """Lease and store; returns who holds the leases. Raises `MediaNotFound`."""
        holder = uuid.uuid4().hex
        sizes, uploaded = await asyncio.to_thread(self._sizes, media)
        await asyncio.to_thread(
            self._database.write,
            lambda session: media_references.lease(session, sizes, uploaded, holder, time.time()),
        )
        await asyncio.to_thread(self._put, media, looks)
        return holder

    def _unseen(self, media: Mapping[str, EncodedMedia]) -> list[EncodedMedia]:
        return [one for name, one in media.items() if one.is_at_hand and not self._is_known(name)]

    def _is_known(self, name: str) -> bool:
        return self._store.exists(name) and self._store.describe(name).num_frames is not None

    def _sizes(self, media: Mapping[str, EncodedMedia]) -> tuple[dict[str, int], set[str]]:
        """Bytes of each, and those that are stored already."""
        sizes = {name: len(one.data) if one.is_at_hand else self._store.size(name) for name, one in media.items()}
        return sizes, {name for name in media if self._store.exists(name)}

    def _put(self, media: Mapping[str, EncodedMedia], looks: Mapping[str, MediaInfo]) -> None:
        """Raises `MediaNotFound` for one that was to be there and has been deleted since."""
        for name, one in media.items():
            if one.is_at_hand:
                look = looks.get(name, MediaInfo())
                self._store.put(one.data, one.kind, size=look.size, num_frames=look.num_frames)
            elif not self._store.exists(name):
                raise not_found(name, one.param)
