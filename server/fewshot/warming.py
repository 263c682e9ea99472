"""Warms versions of support sets, on request and for the background task that keeps them warm (`maintenance`).

Warming encodes and embeds a version's media, and chooses and fits the method for its labels. On request, it also embeds its
texts and computes its shots. Vectors and fits stay in the database; everything else is lost with the worker. So in a new
worker every status is "pending" again, until the background task has warmed the same versions. Warming has a lower priority
than all requests of clients.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from model.prompt import EncodedPrompt, Media, encode
from server.concurrency import cancel, run_concurrently
from server.errors import EngineDied, EngineNotReady, ServerError, SupportSetNotFound
from server.fewshot.comparison import Comparison
from server.limits.background import MAX_DEATHS
from server.limits.shared_limit import SharedLimit
from server.media.source import EncodedMedia
from server.prompt import PreparedPrompt
from server.store.records import SupportSet
from server.wire import BACKGROUND_PRIORITY, Admitted, Generate, Sampling

# number of media, or of prompts, in a batch: enough for the worker
MAX_CONCURRENT = 8
# number of batches that are warmed concurrently: the versions of all tenants take turns
MAX_BATCHES = 2
MAX_REMEMBERED = 4096
# limit of the tokens in the prompts of a tenant's remembered versions, of which a version may have one per example
MAX_REMEMBERED_TOKENS = 4_000_000
# limit of the tasks that clients have requested, of all tenants: each holds its prompts until its turn comes
MAX_UNFINISHED = 16

Status = Literal["pending", "warming", "ready", "failed"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """The progress of warming a version.

    `media_encoded` plus `media_cached` is the number of media in the worker; `media_embedded` and `texts_embedded` count
    those with a vector in the database. `prompt_tokens` counts the tokens of computed shots. `shots` counts shots that
    attend alone, and `shot_bytes` their keys and values. `error` is why warming failed.
    """

    status: Status = "pending"
    num_media: int = 0
    media_encoded: int = 0
    media_cached: int = 0
    media_embedded: int = 0
    texts_embedded: int = 0
    prompt_tokens: int = 0
    shots: int = 0
    shot_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmTarget:
    """The parts of a version to warm in addition to its media.

    `prompts`: the shots of the version in one prompt; if they attend alone, each in its own prompt.
    """

    prompts: tuple[PreparedPrompt, ...] = ()
    with_texts: bool = False

    def covers(self, other: WarmTarget) -> bool:
        if other.with_texts and not self.with_texts:
            return False
        return not other.prompts or [p.encoded for p in self.prompts] == [p.encoded for p in other.prompts]

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.encoded.token_ids) for prompt in self.prompts)

    @property
    def shots(self) -> list[EncodedPrompt]:
        """The prompts of shots that attend alone."""
        return [prompt.encoded for prompt in self.prompts if prompt.encoded.has_spans]


MEDIA_ONLY = WarmTarget()


@dataclass(slots=True)
class _Entry:
    """The warming of one version in the worker `worker_id`. `num_deaths` counts the workers that died during it.

    `is_deleted`: the set was deleted meanwhile, so the warming ends after the current batch.
    """

    set_id: str
    worker_id: object
    target: WarmTarget
    warmth: Warmth
    task: asyncio.Task[None] = field(init=False)
    num_deaths: int = 0
    is_interrupted: bool = False
    is_deleted: bool = False
    num_tokens: int = field(init=False)  # in the prompts of the target

    def __post_init__(self) -> None:
        self.num_tokens = self.target.num_tokens

    @property
    def is_wanted(self) -> bool:
        return self.is_interrupted or self.warmth.status in ("ready", "warming")

    @property
    def is_deadly(self) -> bool:
        return self.num_deaths >= MAX_DEATHS


class Warming:
    """Warms versions in background tasks, and remembers the progress of each.

    `slots`: the tasks that clients of all tenants have requested and that are unfinished. `turns`: the batches of all
    tenants that are warmed concurrently, and the versions that are read for it.
    """

    def __init__(self, comparison: Comparison, slots: SharedLimit, turns: asyncio.Semaphore) -> None:
        self._comparison = comparison
        self._retrieval = comparison.retrieval
        self.engine = self._retrieval.engine
        self.slots = slots
        self.turns = turns
        self._entries: OrderedDict[tuple[str, int], _Entry] = OrderedDict()
        self._num_tokens = 0  # in the prompts of all entries
        # the unfinished tasks, also of entries that others have replaced
        self._tasks: dict[asyncio.Task[None], _Entry] = {}

    @property
    def worker_id(self) -> object:
        """An id of the running worker, different after each restart."""
        return self.engine.info.get("pid")

    def warmth(self, set_id: str, version: int) -> Warmth:
        entry = self._entries.get((set_id, version))
        return entry.warmth if entry is not None and entry.worker_id == self.worker_id else Warmth()

    def num_by_status(self, versions: Set[tuple[str, int]]) -> dict[str, int]:
        """Return the number of these versions, pairs of set id and version, for each status.

        Only those that are remembered are looked at, because a tenant may have a hundred thousand sets.
        """
        counts = Counter(self.warmth(*key).status for key in self._entries if key in versions)
        counts["pending"] += len(versions) - counts.total()
        return {status: counts[status] for status in get_args(Status)}

    async def warm(
        self, support_set: SupportSet, target: WarmTarget = MEDIA_ONLY, *, requester: str | None, wait: bool = False
    ) -> Warmth:
        """Start warming, unless a running task covers the target, and `wait` for its end.

        `requester`: the client, whose task takes a slot; None for the maintenance of support sets. Raises
        `EngineNotReady`, `Overloaded` and `ClientOverShare`.
        """
        if self.engine.state != "ready":
            raise EngineNotReady(f"the model is not ready: the engine is {self.engine.state}")
        entry = self._entries.get((support_set.id, support_set.version))
        if entry is not None and (entry.worker_id != self.worker_id or entry.task.done()):
            entry = None
        if entry is None or not entry.target.covers(target):
            if requester is not None:
                self.slots.check(requester)
            entry = self._start(support_set, target, None if entry is None else entry.task, requester)
        if wait:
            await asyncio.shield(entry.task)
        return entry.warmth

    def lost(self) -> list[tuple[str, int]]:
        """Return the versions that were warm in a previous worker, as set id and version, in the order of warming."""
        lost = ((key, entry) for key, entry in self._entries.items() if entry.worker_id != self.worker_id)
        return [key for key, entry in lost if entry.is_wanted and not entry.is_deadly]

    async def warm_again(self, support_set: SupportSet) -> Warmth:
        """Warm the last target of a version again, or its media, and wait for the end.

        If several workers died while they warmed a version, it stays failed until a client requests its warming.
        """
        entry = self._entries.get((support_set.id, support_set.version))
        if entry is not None and entry.is_deadly:
            return entry.warmth
        target = MEDIA_ONLY if entry is None else entry.target
        return await self.warm(support_set, target, requester=None, wait=True)

    def shots(self, set_id: str, version: int) -> list[EncodedPrompt]:
        """Return a prompt per shot that attends alone and has been computed in this worker."""
        entry = self._entries.get((set_id, version))
        is_ready = entry is not None and entry.worker_id == self.worker_id and entry.warmth.status == "ready"
        return entry.target.shots if entry is not None and is_ready else []

    def forget(self, set_id: str, version: int) -> None:
        self._discard((set_id, version))

    def end(self, set_id: str) -> None:
        """End the warming of all versions of a set that was deleted, and forget them."""
        for key in [key for key in self._entries if key[0] == set_id]:
            self._discard(key)
        for entry in self._tasks.values():
            entry.is_deleted |= entry.set_id == set_id

    async def stop(self) -> None:
        await cancel(self._tasks)

    def _start(
        self,
        support_set: SupportSet,
        target: WarmTarget,
        previous: asyncio.Task[None] | None,
        requester: str | None,
    ) -> _Entry:
        entry = _Entry(
            support_set.id, self.worker_id, target, Warmth(status="warming", num_media=len(support_set.media))
        )
        key = (support_set.id, support_set.version)
        if (last := self._entries.get(key)) is not None and last.is_interrupted:
            entry.num_deaths = last.num_deaths
        entry.task = asyncio.create_task(self._run(entry, support_set, previous))
        self._tasks[entry.task] = entry
        entry.task.add_done_callback(self._tasks.pop)
        if requester is not None:
            self.slots.take(requester)
            entry.task.add_done_callback(lambda _: self.slots.release(requester))
        self._remember(key, entry)
        return entry

    def _remember(self, key: tuple[str, int], entry: _Entry) -> None:
        self._discard(key)
        self._entries[key] = entry
        self._num_tokens += entry.num_tokens
        # the last one stays, however many prompts it has
        while len(self._entries) > 1 and (
            len(self._entries) > MAX_REMEMBERED or self._num_tokens > MAX_REMEMBERED_TOKENS
        ):
            self._discard(next(iter(self._entries)))

    def _discard(self, key: tuple[str, int]) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self._num_tokens -= entry.num_tokens

    async def _run(self, entry: _Entry, support_set: SupportSet, previous: asyncio.Task[None] | None) -> None:
        """Warm a version after `previous`, an unfinished task for the same version, whose results are cached then."""
        if previous is not None:
            await asyncio.wait([previous])
        try:
            await self._warm_media(entry, support_set.media)
            await self._comparison.fit_version(support_set)
            if entry.target.with_texts:
                vectors = await self._retrieval.embed_texts(support_set.examples)
                entry.warmth = replace(entry.warmth, texts_embedded=len(vectors))
            await self._compute_shots(entry)
            entry.warmth, entry.num_deaths = replace(entry.warmth, status="ready"), 0
        except ServerError as error:
            entry.is_interrupted = isinstance(error, EngineDied | EngineNotReady)
            entry.num_deaths += isinstance(error, EngineDied)
            entry.warmth = replace(entry.warmth, status="failed", error=error.message)
        except Exception:
            logger.exception("warming a support set failed", extra={"support_set": support_set.id})
            entry.warmth = replace(entry.warmth, status="failed", error="internal error")

    @asynccontextmanager
    async def _in_turn(self, entry: _Entry) -> AsyncIterator[None]:
        """Wait for a turn. Raises `SupportSetNotFound` if the set has been deleted."""
        async with self.turns:
            if entry.is_deleted:
                raise SupportSetNotFound("the support set has been deleted")
            yield

    async def _warm_media(self, entry: _Entry, media_ids: Sequence[str]) -> None:
        """Encode media in batches and embed each batch while the worker still has its features.

        Each media item has its own prompt, so that it fails alone and waits only for its own media slot.
        """
        for start in range(0, len(media_ids), MAX_CONCURRENT):
            async with self._in_turn(entry):
                await self._warm_batch(entry, media_ids[start : start + MAX_CONCURRENT])

    async def _warm_batch(self, entry: _Entry, media_ids: Sequence[str]) -> None:
        store, tokenizer = self._retrieval.store, self._retrieval.model.tokenizer
        media = await asyncio.to_thread(lambda: [store.find(media_id) for media_id in media_ids])
        prompts = [encode([Media(item.digest)], tokenizer) for item in media]
        work = [self._encode(entry, prompt, {m.digest: m}) for prompt, m in zip(prompts, media, strict=True)]
        results = await asyncio.gather(*work, return_exceptions=True)
        if errors := [result for result in results if isinstance(result, BaseException)]:
            raise errors[0]
        num_embedded = entry.warmth.media_embedded + len(await self._retrieval.embed_media(media_ids))
        entry.warmth = replace(entry.warmth, media_embedded=num_embedded)

    async def _encode(self, entry: _Entry, prompt: EncodedPrompt, media: Mapping[bytes, EncodedMedia]) -> None:
        """Compute the prompt of one media item, and count the item."""
        admitted = await self._compute(prompt, media)
        entry.warmth = replace(
            entry.warmth,
            media_encoded=entry.warmth.media_encoded + admitted.media_encoded,
            media_cached=entry.warmth.media_cached + admitted.media_cached,
        )

    async def _compute_shots(self, entry: _Entry) -> None:
        """Compute the prompts of the target, several at a time, and count their shots."""
        prompts = entry.target.prompts
        for start in range(0, len(prompts), MAX_CONCURRENT):
            batch = prompts[start : start + MAX_CONCURRENT]
            async with self._in_turn(entry):
                await run_concurrently([self._compute(prompt.encoded, prompt.media) for prompt in batch])
            encoded = [prompt.encoded for prompt in batch]
            entry.warmth = replace(
                entry.warmth,
                prompt_tokens=entry.warmth.prompt_tokens + sum(map(_num_shot_tokens, encoded)),
                shots=entry.warmth.shots + sum(prompt.has_spans for prompt in encoded),
                shot_bytes=entry.warmth.shot_bytes + sum(map(self._shot_bytes, encoded)),
            )

    def _shot_bytes(self, prompt: EncodedPrompt) -> int:
        """Return the memory of the shot of a prompt, besides its prefix and query; 0 if it is not known."""
        block_size, block_bytes = (int(self.engine.info.get(name, 0)) for name in ("block_size", "block_bytes"))
        return -(-_num_shot_tokens(prompt) // block_size) * block_bytes if prompt.has_spans and block_size else 0

    async def _compute(self, prompt: EncodedPrompt, media: Mapping[bytes, EncodedMedia]) -> Admitted:
        """Have the worker compute a prompt, so that its caches hold it; return what they held before."""
        request = Generate(
            request_id=f"warm-{uuid.uuid4().hex}",
            prompt=prompt,
            sampling=Sampling(max_tokens=0),
            priority=BACKGROUND_PRIORITY,
            arrived=time.monotonic(),
        )
        async with aclosing(self.engine.stream(request, media)) as events:
            (admitted,) = [event async for event in events if isinstance(event, Admitted)]
        return admitted


def _num_shot_tokens(prompt: EncodedPrompt) -> int:
    """Return the tokens of the shots of a prompt: all of them, or those between prefix and query."""
    starts = prompt.span_starts
    return starts[-1] - starts[1] if prompt.has_spans else len(prompt.token_ids)
