"""Keeps support sets warm and pinned, and deletes expired sets, in a background task.

It compares the database with what this worker was asked to keep, after every change and at regular intervals. So it also
handles a restarted worker and changes that another server made. Pinned sets come first; then the sets that were warm in the
worker before, one per round.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress

from model.prompt import EncodedPrompt
from server.engine_client.client import Client
from server.errors import ServerError, SupportSetNotFound
from server.fewshot.retrieval import EmbeddingStore
from server.fewshot.warming import Warming
from server.media.source import digest_of
from server.metrics import Metrics
from server.store.records import SupportSet, Totals
from server.store.support_sets import SupportSets

logger = logging.getLogger(__name__)

# the longest delay until a new worker, or a change by another server, is noticed
POLL_SECONDS = 2.0


class Maintenance:
    """Runs one round after the other until it is cancelled."""

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
        # of this worker: media that it was asked to keep, and versions that could not be warmed since the last sweep
        self._worker_id: object = None
        self._pinned_media: set[str] = set()
        self._pinned_shots: dict[tuple[str, int], list[EncodedPrompt]] = {}
        self._failed_versions: set[tuple[str, int]] = set()

    async def run(self) -> None:
        """Run until cancelled; after an error the next round tries again."""
        while True:
            delay = POLL_SECONDS
            try:
                if await self.run_once():
                    delay = 0.0
            except ServerError as error:
                logger.warning("maintenance of support sets failed", extra={"error": error.message})
            except Exception:
                logger.exception("maintenance of support sets failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._support_sets.changed.wait()

    async def run_once(self) -> bool:
        """Sweep if a sweep is due, and warm sets if the worker is ready; return whether more sets are to be warmed."""
        is_changed, is_due = self._support_sets.changed.is_set(), time.monotonic() >= self._next_sweep
        self._support_sets.changed.clear()
        if is_due:
            await self._support_sets.sweep()
            await self._embeddings.sweep()
            self._next_sweep = time.monotonic() + self._sweep_interval
            self._failed_versions.clear()
        if is_due or is_changed:
            self._totals = await self._support_sets.totals()
        self._update_metrics()
        if self._client.state != "ready":
            return False
        await self._pin()
        has_more = await self._warm_again()
        self._update_metrics()
        return has_more

    async def _warm_again(self) -> bool:
        """Warm one version that was warm in a worker before; return whether there are more."""
        lost = self._warming.lost()
        for set_id, version in lost[:1]:
            try:
                await self._warming.warm_again(await self._support_sets.get_version(set_id, version))
            except SupportSetNotFound:  # deleted meanwhile
                self._warming.forget(set_id, version)
        return len(lost) > 1

    async def _pin(self) -> None:
        """Pin sets in the order of their age: the worker keeps as many media as its quota has room for."""
        if self._worker_id != self._warming.worker_id:
            self._worker_id, self._pinned_media, self._failed_versions = self._warming.worker_id, set(), set()
            self._pinned_shots = {}
        media: set[str] = set()
        shots: dict[tuple[str, int], list[EncodedPrompt]] = {}
        for set_id, version in await self._support_sets.pinned():
            with suppress(SupportSetNotFound):  # deleted meanwhile
                support_set = await self._support_sets.get_version(set_id, version)
                if await self._warm_and_pin(support_set):
                    media.update(support_set.media)
                    shots[set_id, version] = self._warming.shots(support_set.id, support_set.version)
        if unpinned := self._pinned_media - media:
            self._client.pin(_digests(unpinned), is_kept=False)
            self._client.pin(_digests(media), is_kept=True)  # there may be room now
        self._pinned_media = media
        self._pin_shots(shots)

    def _pin_shots(self, shots: dict[tuple[str, int], list[EncodedPrompt]]) -> None:
        """Pin these shots, and release those of other sets or templates."""
        if shots == self._pinned_shots:
            return
        if released := [prompt for prompts in self._pinned_shots.values() for prompt in prompts]:
            self._client.pin([], is_kept=False, prompts=released)
        if pinned := [prompt for prompts in shots.values() for prompt in prompts]:
            self._client.pin([], is_kept=True, prompts=pinned)
        self._pinned_shots = shots

    async def _warm_and_pin(self, support_set: SupportSet) -> bool:
        """Return whether the set's media are pinned; media must be warm first, since only the worker's media can stay."""
        key = (support_set.id, support_set.version)
        if self._pinned_media.issuperset(support_set.media):
            return True
        if key in self._failed_versions:
            return False
        warmth = await self._warming.warm_again(support_set)
        if warmth.status != "ready":
            self._failed_versions.add(key)
            return False
        self._client.pin(_digests(support_set.media), is_kept=True)
        return True

    def _update_metrics(self) -> None:
        self._metrics.support_set_media_bytes.set(self._totals.num_bytes)
        self._metrics.count_support_sets(self._warming.num_by_status(self._totals.latest))


def _digests(media: Iterable[str]) -> list[bytes]:
    return [digest_of(media_id) for media_id in media]
