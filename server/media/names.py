"""Names that clients give to their media (`uuid` of a part), so that later parts need no data.

The encoded bytes of the last used media are kept in memory, up to a limit. A name is kept longer than its bytes, so that it
never refers to other media.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace

from server.access.tenants import DEFAULT_TENANT
from server.errors import InvalidMedia, MediaNameTaken, NamedMediaNotFound
from server.media.pool import DecodePool
from server.media.source import EncodedMedia, Kind

# maximum number of names; each has at most 512 characters
MAX_NAMES = 1 << 14

# the kind of the media, and the name
Key = tuple[Kind, str]


@dataclass(slots=True)
class _Names:
    """The names of one tenant, and the media whose bytes are kept; the last used ones are at the end."""

    digests: OrderedDict[Key, bytes] = field(default_factory=OrderedDict)
    media: OrderedDict[Key, EncodedMedia] = field(default_factory=OrderedDict)
    num_bytes: int = 0

    def add(self, key: Key, media: EncodedMedia, *, with_bytes: bool) -> None:
        self.forget(key)
        self.digests[key] = media.digest
        if with_bytes:
            self.media[key] = media
            self.num_bytes += media.num_bytes

    def forget(self, key: Key) -> None:
        self.digests.pop(key, None)
        self.drop(key)

    def drop(self, key: Key) -> None:
        """Drop the bytes of a name."""
        if (media := self.media.pop(key, None)) is not None:
            self.num_bytes -= media.num_bytes


class MediaNames:
    """The named media of all clients, at most `max_bytes` in total. The tenant with the most bytes makes room for others.

    If `decoder` cannot decode the bytes of a name, the name can be reused.
    """

    def __init__(self, max_bytes: int, decoder: DecodePool) -> None:
        self._max_bytes = max_bytes
        self._decoder = decoder
        self._of: defaultdict[str, _Names] = defaultdict(_Names)  # by tenant

    def find(self, name: str, kind: Kind, param: str, tenant: str = DEFAULT_TENANT) -> EncodedMedia:
        """Return the media item of a tenant's name, at `param` of a request. Raises `NamedMediaNotFound`."""
        key, names = (kind, name), self._of[tenant]
        if (media := names.media.get(key)) is None:
            message = (
                f"the server has no {kind} with the uuid {name[:80]!r}, or no longer: send it again, with its data"
            )
            raise NamedMediaNotFound(message, param=param)
        names.digests.move_to_end(key)
        names.media.move_to_end(key)
        return replace(media, param=param)

    async def keep(self, name: str, media: EncodedMedia, param: str, tenant: str = DEFAULT_TENANT) -> None:
        """Give a name to media that were sent. Raises `MediaNameTaken` if it is the name of other media of the tenant."""
        key, names = (media.kind, name), self._of[tenant]
        while (digest := names.digests.get(key, media.digest)) != media.digest:
            if await self._is_media(names.media.get(key)):
                message = f"the uuid {name[:80]!r} belongs to another {media.kind}: choose another uuid"
                raise MediaNameTaken(message, param=param)
            if names.digests.get(key) == digest:  # not replaced meanwhile
                names.forget(key)
        names.add(key, media, with_bytes=media.num_bytes <= self._max_bytes)
        self._make_room()

    async def _is_media(self, media: EncodedMedia | None) -> bool:
        """Return whether the bytes of a name can be decoded; True if they were dropped."""
        if media is None:
            return True
        try:
            await self._decoder.decode(media)
        except InvalidMedia:
            return False
        return True

    def _make_room(self) -> None:
        tenants = self._of.values()
        while sum(names.num_bytes for names in tenants) > self._max_bytes:
            largest = max(tenants, key=lambda names: names.num_bytes)
            largest.drop(next(iter(largest.media)))
        while sum(len(names.digests) for names in tenants) > MAX_NAMES:
            longest = max(tenants, key=lambda names: len(names.digests))
            longest.forget(next(iter(longest.digests)))
