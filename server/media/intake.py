"""Where a request's media come in: a part that names a media becomes its encoded bytes, whatever it names it by.

Nothing is decoded here, and what is stored is not even read: the worker may hold the media already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from server.errors import InvalidMedia, InvalidRequest, UnsupportedParameter
from server.media.fetch import Fetcher
from server.media.source import EncodedMedia, Kind, read_data_url
from server.media.store import MediaStore, not_found
from server.schemas.prompt import ImageIdPart, ImageUrlPart, MediaPart, VideoIdPart, VideoUrlPart
from server.settings import Settings


class Intake:
    def __init__(self, settings: Settings, store: MediaStore, fetcher: Fetcher | None = None) -> None:
        self.settings = settings
        self.store = store
        self._fetcher = fetcher or Fetcher(settings)

    async def read(self, part: MediaPart, param: str) -> EncodedMedia:
        """`param`: where the part stands in the request. Raises `InvalidRequest` or `MediaNotFound` that names it."""
        match part:
            case ImageUrlPart():
                return await self.read_url(part.image_url.url, "image", f"{param}.image_url.url")
            case VideoUrlPart():
                return await self.read_url(part.video_url.url, "video", f"{param}.video_url.url")
            case ImageIdPart():
                return await self._find(part.image_id, "image", f"{param}.image_id")
            case VideoIdPart():
                return await self._find(part.video_id, "video", f"{param}.video_id")

    async def read_all(self, parts: Mapping[str, MediaPart], param: str) -> dict[str, EncodedMedia]:
        """Every part of a prompt under its place, side by side. `param`: the prompt that holds them."""
        self._check_number(len(parts), param)
        reading = {place: asyncio.ensure_future(self.read(part, place)) for place, part in parts.items()}
        try:
            found = {place: await read for place, read in reading.items()}
        finally:
            for read in reading.values():
                read.cancel()
            await asyncio.gather(*reading.values(), return_exceptions=True)
        self._check_total(found, param)
        return found

    async def find_all(self, names: Collection[str], param: str) -> list[EncodedMedia]:
        """Stored media of a prompt by their ids: in a folder all by one thread, in an object store side by side."""
        self._check_number(len(names), param)
        if self.store.is_local:
            return await asyncio.to_thread(lambda: [self.store.find(name, param) for name in names])
        return await asyncio.gather(*(asyncio.to_thread(self.store.find, name, param) for name in names))

    async def read_url(self, url: str, kind: Kind, param: str) -> EncodedMedia:
        """A data URL, or one of a host that may be fetched from."""
        if url.partition(":")[0].lower() not in ("http", "https"):
            return read_data_url(url, kind, max_bytes=self.settings.max_media_bytes, param=param)
        if not self._fetcher.is_on:
            raise UnsupportedParameter(f"{kind} URLs are not fetched: send the bytes as a data URL", param=param)
        return await self._fetcher.fetch(url, kind, param)

    async def _find(self, name: str, kind: Kind, param: str) -> EncodedMedia:
        found = await asyncio.to_thread(self.store.find, name, param)
        if found.kind != kind:
            raise not_found(name, param)
        return found

    def _check_number(self, number: int, param: str) -> None:
        if number > (limit := self.settings.max_media_per_request):
            raise InvalidRequest(f"{number} images and videos in one prompt, the limit is {limit}", param=param)

    def _check_total(self, found: Mapping[str, EncodedMedia], param: str) -> None:
        """What was fetched counts as if it had come in the body. What is stored is read one by one, if at all."""
        total = sum(len(media.data) for media in {m.digest: m for m in found.values()}.values() if media.is_at_hand)
        if total > self.settings.max_body_bytes:
            message = f"{total} bytes of media in one prompt, the limit is {self.settings.max_body_bytes}"
            raise InvalidMedia(message, param=param)
