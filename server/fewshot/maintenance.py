"""The background tasks of support sets: they delete expired data and keep sets warm.

After every change and at regular intervals, the database is compared with the requests that were sent to this worker. So a
restarted worker and changes by another server are handled, too. Each tenant's sets are kept warm by a task of their own:
first the pinned sets, then those that were warm in the previous worker. A sweep is a task of its own, too. So a large set
delays no other tenant and no sweep, and a sweep that has much to delete delays no set.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import get_args

from model.prompt import EncodedPrompt
from server.concurrency import cancel
from server.engine_client.client import EngineClient
from server.errors import ServerError, SupportSetNotFound
from server.fewshot.warming import Status, Warming
from server.media.source import digest_of
from server.store.records import SupportSet, Totals
from server.store.support_sets import SupportSets
from server.telemetry.metrics import Metrics

# Twice this is the longest delay until a new worker, or a change by another server, is noticed; a change by this server is
# noticed within it.
POLL_SECONDS = 2.0
# Pause of the rounds per time of a round, at most `POLL_SECONDS`: a round reads the ids of all sets, of which there may be
# very many, and one client may change its sets without end.
REST_OF_ROUNDS = 10.0

# the pinned versions of each tenant, as pairs of set id and version
Pinned = Mapping[str, Sequence[tuple[str, int]]]

logger = logging.getLogger(__name__)


class WarmSets:
    """The support sets of one tenant that are kept warm."""

    def __init__(self, support_sets: SupportSets, warming: Warming) -> None:
        self.warming = warming
        self._support_sets = support_sets
        self._engine = warming.engine
        # for this worker: media and shots of pinned versions, and versions that could not be warmed since the last sweep
        self._worker_id: object = None
        self._pinned_media: dict[tuple[str, int], Sequence[str]] = {}
        self._pinned_shots: dict[tuple[str, int], list[EncodedPrompt]] = {}
        self._failed_versions: set[tuple[str, int]] = set()

    async def pin(self, versions: Sequence[tuple[str, int]]) -> bool:
        """Pin the media and the computed shots of these versions, and no others; return whether some were unpinned.

        The versions are pairs of set id and version, in the order of their age: the worker keeps media until its quota is
        used up.
        """
        if self._worker_id != self.warming.worker_id:
            self._worker_id, self._failed_versions = self.warming.worker_id, set()
            self._pinned_media, self._pinned_shots = {}, {}
        for set_id, version in versions:
            with suppress(SupportSetNotFound):  # deleted meanwhile
                await self._warm_and_pin(set_id, version)
        kept = {key: self._pinned_media[key] for key in versions if key in self._pinned_media}
        if unpinned := {*chain(*self._pinned_media.values())}.difference(*kept.values()):
            self._engine.pin(_digests(unpinned), is_kept=False)
        self._pinned_media = kept
        are_released = self._pin_shots({key: self.warming.shots(*key) for key in kept})
        return are_released or bool(unpinned)

    def pin_again(self) -> None:
        """Pin the same media and shots again: there may be room now, and tenants that share caches also share pins."""
        media, shots = chain(*self._pinned_media.values()), chain(*self._pinned_shots.values())
        self._engine.pin(_digests(media), is_kept=True, prompts=[*shots])

    async def warm_again(self) -> bool:
        """Warm one version that was warm in a previous worker; return whether there are more."""
        lost = self.warming.lost()
        for set_id, version in lost[:1]:
            try:
                await self.warming.warm_again(await self._read(set_id, version))
            except SupportSetNotFound:  # deleted meanwhile
                self.warming.forget(set_id, version)
        return len(lost) > 1

    def forgive(self) -> None:
        """Forget which versions could not be warmed, so that they are tried again."""
        self._failed_versions.clear()

    def _pin_shots(self, shots: dict[tuple[str, int], list[EncodedPrompt]]) -> bool:
        """Pin these shots, and release those of other sets or templates; return whether some were released."""
        if shots == self._pinned_shots:
            return False
        if released := [*chain(*self._pinned_shots.values())]:
            self._engine.pin([], is_kept=False, prompts=released)
        if pinned := [*chain(*shots.values())]:
            self._engine.pin([], is_kept=True, prompts=pinned)
        self._pinned_shots = shots
        return bool(released)

    async def _warm_and_pin(self, set_id: str, version: int) -> None:
        """Pin the media of a version, unless they are; they are warmed first: the worker can pin only its own media."""
        key = (set_id, version)
        if key in self._pinned_media or key in self._failed_versions:
            return
        support_set = await self._read(set_id, version)
        if (await self.warming.warm_again(support_set)).status == "ready":
            self._engine.pin(_digests(support_set.media), is_kept=True)
            self._pinned_media[key] = support_set.media
        else:
            self._failed_versions.add(key)

    async def _read(self, set_id: str, version: int) -> SupportSet:
        """Return a version. Reads for all tenants take turns, so that they do not fill the database's queue."""
        async with self.warming.turns:
            return await self._support_sets.get_version(set_id, version)


class Maintenance:
    """Runs one round after the other until it is cancelled, and a task per tenant that keeps its sets warm.

    `support_sets` may be those of any tenant: only their methods for all tenants are called. `sweeps` delete data of all
    tenants that are no longer needed. `warm_sets` returns the warm sets of the known tenants and of the named ones, by
    tenant.
    """

    def __init__(
        self,
        support_sets: SupportSets,
        sweeps: Sequence[Callable[[], Awaitable[None]]],
        warm_sets: Callable[[Iterable[str]], Mapping[str, WarmSets]],
        engine: EngineClient,
        metrics: Metrics,
        *,
        sweep_interval: float,
    ) -> None:
        self._support_sets = support_sets
        self._sweeps = sweeps
        self._warm_sets = warm_sets
        self._engine = engine
        self._metrics = metrics
        self._sweep_interval = sweep_interval
        self._next_sweep = 0.0
        self._totals = Totals(latest={}, num_bytes=0)
        self._must_count = True  # until it succeeds: the next round tries again
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sweeping: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Run until cancelled; after an error the next round tries again."""
        try:
            while True:
                begun = time.monotonic()
                with _logged():
                    await self.run_once()
                await asyncio.sleep(min(REST_OF_ROUNDS * (time.monotonic() - begun), POLL_SECONDS))
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._support_sets.changed.wait()
        finally:
            await cancel(self._running)

    async def run_once(self) -> list[asyncio.Task[None]]:
        """Begin a sweep if one is due, and warm sets if the worker is ready; return the running tasks."""
        is_changed = self._support_sets.changed.is_set()
        is_due = self._sweeping is None and time.monotonic() >= self._next_sweep
        self._support_sets.changed.clear()
        if is_due:
            self._next_sweep = time.monotonic() + self._sweep_interval
            for warm_sets in self._warm_sets(()).values():
                warm_sets.forgive()
            self._sweeping = asyncio.create_task(self._sweep())
        self._must_count |= is_due or is_changed
        if self._must_count:
            self._totals = await self._support_sets.totals()
            self._must_count = False
        self._update_metrics()
        if self._engine.state == "ready":
            pinned = await self._support_sets.pinned()
            for tenant, warm_sets in self._warm_sets(pinned).items():
                if tenant not in self._tasks:
                    self._tasks[tenant] = asyncio.create_task(self._keep_warm(tenant, warm_sets, pinned))
        return self._running

    @property
    def _running(self) -> list[asyncio.Task[None]]:
        return [*filter(None, [self._sweeping]), *self._tasks.values()]

    async def _keep_warm(self, tenant: str, warm_sets: WarmSets, pinned: Pinned) -> None:
        """Warm the sets of a tenant: the pinned ones, and before each further set those that were pinned meanwhile."""
        with _logged():
            has_more = True
            while has_more:
                if await warm_sets.pin(pinned.get(tenant, ())):
                    for each in self._warm_sets(()).values():
                        each.pin_again()
                has_more = await warm_sets.warm_again()
                pinned = await self._support_sets.pinned() if has_more else pinned
        del self._tasks[tenant]

    async def _sweep(self) -> None:
        """Sweep; what one sweep could not delete, the next one tries again."""
        try:
            for sweep in self._sweeps:
                with _logged():
                    await sweep()
        finally:
            self._sweeping = None
            self._support_sets.changed.set()  # the totals are now smaller

    def _update_metrics(self) -> None:
        numbers = Counter[str](dict.fromkeys(get_args(Status), 0))
        by_tenant = self._warm_sets(self._totals.latest)
        for tenant, versions in self._totals.latest.items():
            numbers.update(by_tenant[tenant].warming.num_by_status(versions))
        self._metrics.support_set_media_bytes.set(self._totals.num_bytes)
        self._metrics.count_support_sets(numbers)


@contextmanager
def _logged() -> Iterator[None]:
    """Log errors, after which the next round tries again."""
    try:
        yield
    except ServerError as error:
        logger.warning("maintenance of support sets failed", extra={"error": error.message})
    except Exception:
        logger.exception("maintenance of support sets failed")


def _digests(media: Iterable[str]) -> list[bytes]:
    return [digest_of(media_id) for media_id in media]
