"""Where a request's media come in: a part that names a media becomes its encoded bytes, whatever it names it by.

Nothing is decoded here: the worker may hold the media already. Reading the store blocks, so it has a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from server.api.schemas import ImageIdPart, ImageUrlPart, MediaPart, VideoIdPart, VideoUrlPart
from server.errors import InvalidRequest
from server.media.source import EncodedMedia, Kind, read_data_url
from server.media.store import MediaStore, not_found
from server.settings import Settings


class Intake:
    def __init__(self, settings: Settings, store: MediaStore) -> None:
        self.settings = settings
        self.store = store

    async def read(self, part: MediaPart, param: str) -> EncodedMedia:
        """`param`: where the part stands in the request. Raises `InvalidRequest` or `MediaNotFound` that names it."""
        match part:
            case ImageUrlPart():
                return self._read_url(part.image_url.url, "image", f"{param}.image_url.url")
            case VideoUrlPart():
                return self._read_url(part.video_url.url, "video", f"{param}.video_url.url")
            case ImageIdPart():
                return await self._get(part.image_id, "image", f"{param}.image_id")
            case VideoIdPart():
                return await self._get(part.video_id, "video", f"{param}.video_id")

    async def read_all(self, parts: Mapping[str, MediaPart], param: str) -> dict[str, EncodedMedia]:
        """Every part of a prompt under its place, the first at fault refused. `param`: the prompt that holds them."""
        limit = self.settings.max_media_per_request
        if len(parts) > limit:
            raise InvalidRequest(f"{len(parts)} images and videos in one prompt, the limit is {limit}", param=param)
        return {place: await self.read(part, place) for place, part in parts.items()}

    def _read_url(self, url: str, kind: Kind, param: str) -> EncodedMedia:
        return read_data_url(url, kind, max_bytes=self.settings.max_media_bytes, param=param)

    async def _get(self, name: str, kind: Kind, param: str) -> EncodedMedia:
        media = await asyncio.to_thread(self.store.get, name, param)
        if media.kind != kind:
            raise not_found(name, param)
        return media
