"""Names that clients give to media which they send (`uuid` of a part), so that later parts need no data.

The encoded bytes of the media used last are kept in memory, up to a limit. A name outlives its bytes: as long as it is
known, it never stands for other media.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from server.access.tenants import DEFAULT_TENANT
from server.errors import InvalidMedia, MediaNameTaken, NamedMediaNotFound
from server.media.pool import DecodePool
from server.media.source import EncodedMedia, Kind

# each has at most 512 characters
MAX_NAMES = 1 << 14

# of a name: the tenant, and what the name is of
Key = tuple[str, Kind, str]


class MediaNames:
    """The named media of all clients, at most `max_bytes` of them.

    A name of bytes that `decoder` cannot decode can be given to others; without a decoder no name can.
    """

    def __init__(self, max_bytes: int, decoder: DecodePool | None = None) -> None:
        self._max_bytes = max_bytes
        self._decoder = decoder
        self._num_bytes = 0
        # the names used last are at the end
        self._digests: OrderedDict[Key, bytes] = OrderedDict()
        self._media: OrderedDict[Key, EncodedMedia] = OrderedDict()

    def find(self, name: str, kind: Kind, param: str, tenant: str = DEFAULT_TENANT) -> EncodedMedia:
        """Return the media item of a tenant's name, at `param` of a request. Raises `NamedMediaNotFound`."""
        key = tenant, kind, name
        if (media := self._media.get(key)) is None:
            message = f"the server has no {kind} with the uuid {name[:80]!r} (any more): send it again, with its data"
            raise NamedMediaNotFound(message, param=param)
        self._digests.move_to_end(key)
        self._media.move_to_end(key)
        return replace(media, param=param)

    async def keep(self, name: str, media: EncodedMedia, param: str, tenant: str = DEFAULT_TENANT) -> None:
        """Give a name to media that were sent. Raises `MediaNameTaken` if it is the name of other media of the tenant."""
        key = tenant, media.kind, name
        while (digest := self._digests.get(key, media.digest)) != media.digest:
            if await self._is_media(key):
                message = f"the uuid {name[:80]!r} is that of another {media.kind}: choose another"
                raise MediaNameTaken(message, param=param)
            if self._digests.get(key) == digest:  # not replaced meanwhile
                self._forget(key)
        self._forget(key)
        self._digests[key] = media.digest
        if media.num_bytes <= self._max_bytes:
            self._media[key] = media
            self._num_bytes += media.num_bytes
        self._make_room()

    async def _is_media(self, key: Key) -> bool:
        """Return whether the bytes of a name can be decoded; those that were dropped count as media."""
        if self._decoder is None or (media := self._media.get(key)) is None:
            return True
        try:
            await self._decoder.decode(media)
        except InvalidMedia:
            return False
        return True

    def _make_room(self) -> None:
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._media)))
        while len(self._digests) > MAX_NAMES:
            self._forget(next(iter(self._digests)))

    def _forget(self, key: Key) -> None:
        self._digests.pop(key, None)
        self._drop(key)

    def _drop(self, key: Key) -> None:
        """Drop the bytes of a name."""
        if (media := self._media.pop(key, None)) is not None:
            self._num_bytes -= media.num_bytes
