"""Reads the media of requests: a part with a URL, a data URL or an id becomes the encoded bytes of an image or video.

Nothing is decoded here, and stored media are not even read, because the worker may hold them already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from functools import partial

from server.concurrency import run_concurrently
from server.errors import InvalidRequest, UnsupportedParameter
from server.media.fetch import Fetcher
from server.media.names import MediaNames
from server.media.pool import DecodePool
from server.media.source import LARGE_URL, EncodedMedia, Kind, kind_of, read_data_url, too_large_together
from server.media.store import MediaStore
from server.schemas.prompt import ImageIdPart, ImageUrlPart, MediaPartOrUrl, VideoIdPart, VideoUrlPart
from server.settings import Settings

# what a field may have instead of a data URL
ALLOWED_URL = "an https URL of a host in media_url_hosts"
BY_ID = ("the id of an uploaded image or video",)


class Intake:
    """Reads the media of a tenant's requests.

    `decoder` checks media when a request reuses their name for other media. `fetcher` fetches URLs, by default within the
    rules of the settings.
    """

    def __init__(
        self, settings: Settings, store: MediaStore, decoder: DecodePool, fetcher: Fetcher | None = None
    ) -> None:
        self.settings = settings
        self.store = store
        self._names = MediaNames(settings.named_media_mb * 2**20, decoder)
        self._fetcher = fetcher or Fetcher(settings)

    def of(self, store: MediaStore) -> Intake:
        intake = copy(self)
        intake.store = store
        return intake

    async def read(self, part: MediaPartOrUrl, param: str) -> EncodedMedia:
        """Read a part. Raises `InvalidRequest`, `NotFound` and `MediaNameTaken`.

        `param` is its path in the request, which errors name.
        """
        match part:
            case ImageUrlPart(image_url=data) | VideoUrlPart(video_url=data):
                kind: Kind = "image" if part.type == "image_url" else "video"
                if data is None:
                    assert part.uuid is not None  # a part has one of the two
                    return self._names.find(part.uuid, kind, f"{param}.uuid", self.store.tenant)
                media = await self.read_url(data.url, kind, f"{param}.{part.type}.url")
                if part.uuid is not None:
                    await self._names.keep(part.uuid, media, f"{param}.uuid", self.store.tenant)
                return media
            case ImageIdPart(image_id=media_id) | VideoIdPart(video_id=media_id):
                kind = "image" if part.type == "image_id" else "video"
                return await self._find(media_id, kind, f"{param}.{part.type}")
            case str() if known := kind_of(part):
                return await self._find(part, known, param)
            case str():
                return await self.read_url(part, "image", param, BY_ID)

    async def read_all(
        self, parts: Mapping[str, MediaPartOrUrl], param: str, *, remedy: str = ""
    ) -> dict[str, EncodedMedia]:
        """Read the parts of a request's prompts concurrently.

        Equal media become one object, with the path of the first one for errors. `parts` are by path in the request;
        `param` is the path of the first prompt, and `remedy` the advice for too many.
        """
        if len(parts) > self.settings.max_media_per_request:
            raise self._too_many(len(parts), param, remedy)
        named = {
            path: part
            for path, part in parts.items()
            # the field with the data has the name of the type
            if isinstance(part, ImageUrlPart | VideoUrlPart) and getattr(part, part.type) is None
        }
        sent = [path for path in parts if path not in named]
        read = dict(zip(sent, await run_concurrently([self.read(parts[path], path) for path in sent]), strict=True))
        # an earlier part of the same request may define the name
        read |= {path: await self.read(part, path) for path, part in named.items()}
        first: dict[bytes, EncodedMedia] = {}
        media = {path: first.setdefault(read[path].digest, read[path]) for path in parts}
        # fetched media count as if sent in the body; stored media are read one by one, if at all
        total = sum(item.num_bytes for item in first.values() if item.is_in_memory)
        if total > (limit := self.settings.max_body_bytes):
            raise too_large_together(total, limit, param)
        return media

    def refer_all(self, media_ids: Collection[str], param: str) -> list[EncodedMedia]:
        """Return the media of a support set's examples, which are stored. Raises `InvalidRequest` for too many."""
        if len(media_ids) > self.settings.max_media_per_request:
            raise self._too_many(len(media_ids), param, "choose a smaller k")
        return [self.store.refer(media_id, param) for media_id in media_ids]

    async def read_url(self, url: str, kind: Kind, param: str, alternatives: Sequence[str] = ()) -> EncodedMedia:
        """Read a data URL, or fetch from an allowed host. Raises `InvalidRequest`.

        `alternatives`: what the field may have instead of a URL, for messages.
        """
        match url.partition(":")[0].lower():
            case "data":
                reading = partial(read_data_url, url, kind, max_bytes=self.settings.max_media_bytes, param=param)
                return reading() if len(url) < LARGE_URL else await asyncio.to_thread(reading)
            case "http" | "https" if self._fetcher.is_enabled:
                return await self._fetcher.fetch(url, kind, param)
            case "http" | "https":
                message = f"{kind} URLs are not fetched: send a data URL, or ask the operator to set media_url_hosts"
                raise UnsupportedParameter(message, param=param)
        fetched = [ALLOWED_URL] if self._fetcher.is_enabled else []
        accepted = " or ".join([f"a data URL (data:{kind}/...;base64,...)", *fetched, *alternatives])
        raise InvalidRequest(f"the {kind} must be {accepted}; the server reads no files by name", param=param)

    async def _find(self, media_id: str, kind: Kind, param: str) -> EncodedMedia:
        media = await asyncio.to_thread(self.store.find, media_id, param)
        if media.kind != kind:
            message = f"{media_id[:80]!r} is an id for {media.kind}_id, not for {kind}_id"
            raise InvalidRequest(message, param=param)
        return media

    def _too_many(self, number: int, param: str, remedy: str) -> InvalidRequest:
        message = f"{number} images and videos in one request, the limit is {self.settings.max_media_per_request}"
        return InvalidRequest(f"{message}: {remedy}" if remedy else message, param=param)
