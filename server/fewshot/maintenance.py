"""The app's background task for support sets: what has expired is swept, what is pinned is warm and stays in the worker.

It compares what the database says with what this worker was told, at every change and every little while; so a worker
that was restarted, and a change that another server made, are seen alike.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress

from server.engine_client.client import Client
from server.errors import ServerError, SupportSetNotFound
from server.fewshot.warming import Warming
from server.media.source import digest_of
from server.metrics import Metrics
from server.store.embeddings import EmbeddingStore
from server.store.records import SupportSet, Totals
from server.store.support_sets import SupportSets

# how soon a new worker, or another server's change, is seen
POLL_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Maintenance:
    def __init__(
        self,
        support_sets: SupportSets,
        embeddings: EmbeddingStore,
        warming: Warming,
        client: Client,
        metrics: Metrics,
        *,
        sweep_interval: float,
    ) -> None:
        self._support_sets = support_sets
        self._embeddings = embeddings
        self._warming = warming
        self._client = client
        self._metrics = metrics
        self._sweep_interval = sweep_interval
        self._next_sweep = 0.0
        self._totals = Totals(latest=[], num_bytes=0)
        # this worker's: media that were asked to stay; versions that could not be warmed, tried again with each sweep
        self._life: object = None
        self._kept: set[str] = set()
        self._failed: set[tuple[str, int]] = set()

    async def run(self) -> None:
        """Until it is cancelled. What fails is tried again."""
        while True:
            try:
                await self.turn()
            except ServerError as error:
                logger.warning("support sets could not be looked after", extra={"error": error.message})
            except Exception:
                logger.exception("support sets could not be looked after")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._support_sets.changed.wait()

    async def turn(self) -> None:
        is_changed, is_due = self._support_sets.changed.is_set(), time.monotonic() >= self._next_sweep
        self._support_sets.changed.clear()
        if is_due:
            await self._support_sets.sweep()
            await self._embeddings.sweep()
            self._next_sweep = time.monotonic() + self._sweep_interval
            self._failed.clear()
        if is_due or is_changed:
            self._totals = await self._support_sets.totals()
        self._count()
        if self._client.state == "ready":
            await self._pin()
            self._count()

    async def _pin(self) -> None:
        """Sets in the order of their age: the worker keeps as many media as its quota has room for."""
        if self._life != self._warming.life:
            self._life, self._kept, self._failed = self._warming.life, set(), set()
        wanted: set[str] = set()
        for set_id, version in await self._support_sets.pinned():
            with suppress(SupportSetNotFound):  # deleted since
                support_set = await self._support_sets.get_version(set_id, version)
                if await self._is_warm(support_set):
                    wanted.update(support_set.media)
        if gone := self._kept - wanted:
            self._client.pin(_digests(gone), is_kept=False)
            self._client.pin(_digests(wanted), is_kept=True)  # now there may be room
        self._kept = wanted

    async def _is_warm(self, support_set: SupportSet) -> bool:
        """Only what is in the worker can be kept there, so what is not kept yet is warmed, and kept at once."""
        key = (support_set.id, support_set.version)
        if self._kept.issuperset(support_set.media):
            return True
        if key in self._failed:
            return False
        warmth = await self._warming.warm(support_set, wait=True)
        if warmth.status != "ready":
            self._failed.add(key)
            return False
        self._client.pin(_digests(support_set.media), is_kept=True)
        return True

    def _count(self) -> None:
        self._metrics.support_set_media_bytes.set(self._totals.num_bytes)
        self._metrics.count_support_sets(self._warming.num_by_status(self._totals.latest))


def _digests(media: Iterable[str]) -> list[bytes]:
    return [digest_of(media_id) for media_id in media]
