"""Warming a version of a support set: its media are encoded and embedded, on request its texts embedded and its shots
computed, before anybody asks.

What is warm is the worker's: a new worker begins cold, and so does the status told here; vectors stay in the database.
Work goes in behind all that clients wait for.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

from model.prompt import EncodedPrompt, Media, encode
from server.engine_client.client import Client
from server.errors import EngineNotReady, ServerError
from server.fewshot.retrieval import Retrieval
from server.media.source import EncodedMedia
from server.media.store import MediaStore
from server.prompt import PreparedPrompt
from server.served_model import ServedModel
from server.store.records import SupportSet
from server.wire import Admitted, Generate, Sampling

# behind every priority that a client may ask for
LAST_PRIORITY = 2**20
# media in the worker at a time: enough to be encoded in batches
SIDE_BY_SIDE = 8
MAX_REMEMBERED = 4096

Status = Literal["pending", "warming", "ready", "failed"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """How far a version is. Media are encoded or found as they were; embedded is what has a vector now; `prompt_tokens`:
    of the shots, if they were asked for; `error`: why it failed."""

    status: Status = "pending"
    num_media: int = 0
    media_encoded: int = 0
    media_cached: int = 0
    media_embedded: int = 0
    texts_embedded: int = 0
    prompt_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmTarget:
    """What shall be warm besides the media."""

    prefix: PreparedPrompt | None = None
    with_texts: bool = False

    def covers(self, other: WarmTarget) -> bool:
        has_texts = self.with_texts or not other.with_texts
        if other.prefix is None or self.prefix is None:
            return has_texts and other.prefix is None
        return has_texts and self.prefix.encoded == other.prefix.encoded


MEDIA_ALONE = WarmTarget()


@dataclass(slots=True)
class _Entry:
    """`life`: of the worker that this was told of."""

    life: object
    wish: WarmTarget
    warmth: Warmth
    task: asyncio.Task[None] | None = None


class Warming:
    def __init__(self, client: Client, model: ServedModel, store: MediaStore, retrieval: Retrieval) -> None:
        self._client = client
        self._model = model
        self._store = store
        self._retrieval = retrieval
        self._entries: OrderedDict[tuple[str, int], _Entry] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def life(self) -> object:
        """Another one for every worker."""
        return self._client.info.get("pid")

    def warmth(self, set_id: str, version: int) -> Warmth:
        entry = self._entries.get((set_id, version))
        return entry.warmth if entry is not None and entry.life == self.life else Warmth()

    def num_by_status(self, versions: Iterable[tuple[str, int]]) -> dict[str, int]:
        """Of these versions, ids and numbers, how many are how warm."""
        counts: dict[str, int] = {"pending": 0, "warming": 0, "ready": 0, "failed": 0}
        for set_id, version in versions:
            counts[self.warmth(set_id, version).status] += 1
        return counts

    async def warm(self, support_set: SupportSet, wish: WarmTarget = MEDIA_ALONE, *, wait: bool = False) -> Warmth:
        """Begin, unless all that is under way; with `wait`, come back when it has ended. Raises `EngineNotReady`."""
        if self._client.state != "ready":
            raise EngineNotReady(f"the model is not ready: the engine is {self._client.state}")
        entry = self._entries.get((support_set.id, support_set.version))
        if entry is not None and (entry.life != self.life or entry.task is None or entry.task.done()):
            entry = None
        if entry is None or not entry.wish.covers(wish):
            entry = self._begin(support_set, wish, None if entry is None else entry.task)
        if wait and entry.task is not None:
            await asyncio.shield(entry.task)
        return entry.warmth

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, support_set: SupportSet, wish: WarmTarget, former: asyncio.Task[None] | None) -> _Entry:
        entry = _Entry(self.life, wish, Warmth(status="warming", num_media=len(support_set.media)))
        entry.task = asyncio.create_task(self._run(entry, support_set, former))
        self._tasks.add(entry.task)
        entry.task.add_done_callback(self._tasks.discard)
        self._remember((support_set.id, support_set.version), entry)
        return entry

    def _remember(self, key: tuple[str, int], entry: _Entry) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > MAX_REMEMBERED:
            self._entries.popitem(last=False)

    async def _run(self, entry: _Entry, support_set: SupportSet, former: asyncio.Task[None] | None) -> None:
        """`former`: warms the same version, and less of it; then most is there."""
        if former is not None:
            await asyncio.wait([former])
        prefix = entry.wish.prefix
        try:
            await self._show_all(entry, support_set.media)
            if entry.wish.with_texts:
                num_texts = await self._retrieval.embed_texts(support_set)
                entry.warmth = replace(entry.warmth, texts_embedded=num_texts)
            if prefix is not None:
                await self._show(entry, prefix.encoded, prefix.media)
                entry.warmth = replace(entry.warmth, prompt_tokens=len(prefix.encoded.token_ids))
            entry.warmth = replace(entry.warmth, status="ready")
        except ServerError as error:
            entry.warmth = replace(entry.warmth, status="failed", error=error.message)
        except Exception:
            logger.exception("a support set could not be warmed", extra={"support_set": support_set.id})
            entry.warmth = replace(entry.warmth, status="failed", error="internal error")

    async def _show_all(self, entry: _Entry, media: Sequence[str]) -> None:
        """One prompt a media, so that each fails by itself and none waits for all the others' slots. Embedded while the
        worker has what it takes: features of media just encoded."""
        for start in range(0, len(media), SIDE_BY_SIDE):
            some = media[start : start + SIDE_BY_SIDE]
            found = await asyncio.to_thread(self._find, some)
            prompts = [encode([Media(one.digest)], self._model.tokenizer) for one in found]
            shown = [self._show(entry, prompt, {one.digest: one}) for prompt, one in zip(prompts, found, strict=True)]
            results = await asyncio.gather(*shown, return_exceptions=True)
            if errors := [result for result in results if isinstance(result, BaseException)]:
                raise errors[0]
            num_embedded = entry.warmth.media_embedded + await self._retrieval.embed_media(some)
            entry.warmth = replace(entry.warmth, media_embedded=num_embedded)

    def _find(self, media: Sequence[str]) -> list[EncodedMedia]:
        return [self._store.find(name) for name in media]

    async def _show(self, entry: _Entry, prompt: EncodedPrompt, media: Mapping[bytes, EncodedMedia]) -> None:
        request = Generate(
            request_id=f"warm-{uuid.uuid4().hex}",
            prompt=prompt,
            sampling=Sampling(max_tokens=0),
            priority=LAST_PRIORITY,
            arrived=time.monotonic(),
        )
        async with aclosing(self._client.stream(request, media)) as events:
            async for event in events:
                if isinstance(event, Admitted):
                    entry.warmth = replace(
                        entry.warmth,
                        media_encoded=entry.warmth.media_encoded + event.media_encoded,
                        media_cached=entry.warmth.media_cached + event.media_cached,
                    )
