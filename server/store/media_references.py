"""References from support sets to stored media: media are kept while they are referred to, and then deleted.

A request leases its media, stores their bytes, and refers to them in the transaction that releases the leases. Bytes
are deleted under the lock of their row, and only without reference or lease: a later lease stores them again. An upload
does the same, but its row is marked in place of a reference, and is not swept. The leases of a request that fails end
when the last of its bytes are stored, and those of a process that dies expire.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy import delete, exists, func, insert, select, update
from sqlalchemy.orm import Session

from server.access.tenants import qualified, split
from server.concurrency import run_concurrently
from server.errors import DatabaseUnavailable, MediaInUse, StorageUnavailable, Unavailable
from server.media.pool import DecodePool
from server.media.source import EncodedMedia
from server.media.store import MediaStore, not_found
from server.media.turns import Job, NoTally, Requester, Tally
from server.store.database import Database, Result, Transaction, chunked
from server.store.records import EmbeddingRow, ExampleMediaRow, LeaseRow, MediaRow

# seconds of a lease, far longer than storing the media of one request takes
LEASE_SECONDS = 900.0
MAX_LEASES = 3
# seconds for which a request that has failed waits until its leases have ended: a database may hang
RELEASE_SECONDS = 1.0
# media that are deleted in one transaction, for which other writers wait
MEDIA_PER_TRANSACTION = 16
# media that a sweep fails to delete before it leaves the rest to the next one
MAX_FAILURES = 16
# media that are decoded concurrently: few, because after an invalid one the rest need not be decoded
DECODE_BATCH = 16
IS_REFERRED_TO = exists().where(ExampleMediaRow.media_id == MediaRow.media_id)

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Media may have been deleted before they were referred to: decode, lease and store them again.

    A lease has expired, or another request has deleted a media item between its decoding and its lease.
    """


class MediaReferences:
    """The media store of a tenant's support sets, with the references to its media.

    `decoder` decodes new media before they are stored; None skips that. `releasing` holds the tasks that end leases.
    """

    def __init__(
        self,
        database: Database,
        store: MediaStore,
        decoder: DecodePool | None = None,
        releasing: set[asyncio.Task[None]] | None = None,
    ) -> None:
        self._database = database
        self._store = store
        self._decoder = decoder
        self._releasing: set[asyncio.Task[None]] = set() if releasing is None else releasing
        # the last media item that a sweep could not delete
        self._failed = ""

    def of(self, store: MediaStore) -> MediaReferences:
        return MediaReferences(self._database, store, self._decoder, self._releasing)

    async def write(
        self,
        media: Mapping[str, EncodedMedia],
        transaction: Transaction[Result],
        prepare: Callable[[], Awaitable[None]],
    ) -> Result:
        """Store `media`, by id, and run `prepare` and then `transaction` with them.

        Both are run again after `LeaseLost`. Raises `InvalidMedia`, `MediaNotFound` and `Unavailable`.
        """
        for _ in range(MAX_LEASES):
            with suppress(LeaseLost):
                return await self._write_leased(media, await self._decode(media), transaction, prepare)
        raise Unavailable("the media could not be stored in time")

    async def upload(self, media: EncodedMedia, info: Mapping[str, Any] | None) -> None:
        """Store a media item that outlives the support sets that refer to it.

        `info` is its description for the store, or None if it was decoded and stored before. Raises `LeaseLost`.
        """
        row_id = self._row_id(media.id)

        def mark(session: Session, now: float) -> None:
            session.execute(update(MediaRow).where(MediaRow.media_id == row_id).values(is_uploaded=True))

        await self._write_leased({media.id: media}, {} if info is None else {media.id: info}, mark)

    async def _write_leased(
        self,
        media: Mapping[str, EncodedMedia],
        infos: Mapping[str, Mapping[str, Any]],
        transaction: Transaction[Result],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> Result:
        """Lease and store media, of which those in `infos` are new; then run `transaction`. Raises `LeaseLost`."""
        holder = uuid.uuid4().hex
        try:
            await self._lease(media, holder)
            await self._store_bytes(media, infos)
            if prepare is not None:
                await prepare()
            return await self._database.write(partial(_commit, transaction, holder, len(media)))
        except BaseException:
            if media:
                await self._release(holder)
            raise

    async def delete(self, media_id: str) -> None:
        """Delete a media item from the store. Raises `MediaInUse` and `MediaNotFound`."""
        row_id = self._row_id(media_id)

        def remove(session: Session, now: float) -> None:
            row = session.scalar(select(MediaRow).where(MediaRow.media_id == row_id).with_for_update())
            if _is_referred_to(session, row_id):
                raise MediaInUse(f"a version of a support set contains {media_id[:80]!r}: delete the set first")
            if _is_leased(session, row_id, now):
                raise MediaInUse(
                    f"a request stores {media_id[:80]!r}: try again when it has ended; if its server was killed, "
                    f"try again {LEASE_SECONDS / 60:.0f} minutes later"
                )
            if row is not None:
                _delete_rows(session, [row_id], now)
            # without a file, the transaction is tried again, or the file was lost
            if row is None or self._store.exists(media_id):
                self._store.delete(media_id)

        await self._database.write(remove)

    async def sweep(self) -> None:
        """Delete the media (rows and bytes) of support sets that no longer exist, for all tenants.

        A media item whose file cannot be deleted keeps its row, and the sweep goes on after it.
        """
        for _ in range(MAX_FAILURES):
            failed = await self._sweep_until_failure()
            self._failed = failed or ""  # the next sweep begins with the first media item again
            if failed is None:
                return
            logger.warning("an unused media item cannot be deleted", extra={"media": failed})

    async def _sweep_until_failure(self) -> str | None:
        """Delete unused media, and return the first one that cannot be deleted."""
        failed: str | None = None

        def delete_some(session: Session, now: float) -> bool:
            nonlocal failed
            num_deleted, failed = self._delete_unused(session, now)
            return num_deleted > 0 and failed is None

        await self._database.sweep(delete_some)
        return failed

    def _delete_unused(self, session: Session, now: float) -> tuple[int, str | None]:
        """Delete up to `MEDIA_PER_TRANSACTION` media; return their number and the one that could not be deleted."""
        unused = (
            select(MediaRow.media_id)
            .where(
                MediaRow.media_id > self._failed,
                ~MediaRow.is_uploaded,
                ~IS_REFERRED_TO,
                ~exists().where(LeaseRow.media_id == MediaRow.media_id, LeaseRow.expires_at > now),
            )
            .order_by(MediaRow.media_id)
            .limit(MEDIA_PER_TRANSACTION)
            .with_for_update(skip_locked=True)
        )
        row_ids = list(session.scalars(unused))
        for number, row_id in enumerate(row_ids):
            try:
                with session.begin_nested():  # without the file, the row stays
                    _delete_rows(session, [row_id], now)
                    self._delete_file(row_id)
            except StorageUnavailable:
                return number, row_id
        return len(row_ids), None

    def _delete_file(self, row_id: str) -> None:
        tenant, media_id = split(row_id)
        store = self._store.of(tenant)
        if store.exists(media_id):
            store.delete(media_id)

    def _row_id(self, media_id: str) -> str:
        return qualified(self._store.tenant, media_id)

    async def _decode(self, media: Mapping[str, EncodedMedia]) -> dict[str, dict[str, Any]]:
        """Decode the sent media that are not stored, and return their descriptions by id. Raises `InvalidMedia`."""
        is_decoded, sent = self._store.is_decoded, [item for item in media.values() if not item.is_stored]
        if self._decoder is None:
            return {item.id: {} for item in sent}
        new = await asyncio.to_thread(lambda: [item for item in sent if not is_decoded(item.id)])
        infos: dict[str, dict[str, Any]] = {}
        # an archive has media of any number of requests
        is_archive = any(not item.is_in_memory for item in new)
        requester = Requester(pixels=NoTally() if is_archive else Tally())
        for start in range(0, len(new), DECODE_BATCH):
            batch = new[start : start + DECODE_BATCH]
            decoded = await run_concurrently([self._decoder.decode(item, Job(requester)) for item in batch])
            for item, frames in zip(batch, decoded, strict=True):
                infos[item.id] = {"size": frames.size, "num_frames": frames.shape[0]}
        return infos

    async def _lease(self, media: Mapping[str, EncodedMedia], holder: str) -> None:
        """Lease the media for `holder`, so that they are not swept."""
        stored = await asyncio.to_thread(self._stored, media)
        for chunk in chunked(list(media)):
            sizes = {self._row_id(media_id): media[media_id].num_bytes for media_id in chunk}
            await self._database.write(partial(self._add_leases, sizes, stored, holder))

    async def _release(self, holder: str) -> None:
        """End the leases of a request that has failed: the next sweep deletes its new media.

        A database that hangs does not hold up the answer again: the leases end when it responds, or expire.
        """

        def release(session: Session, now: float) -> None:
            session.execute(delete(LeaseRow).where(LeaseRow.holder == holder))

        async def write() -> None:
            with suppress(DatabaseUnavailable):
                await self._database.write(release)

        releasing = asyncio.create_task(write())
        self._releasing.add(releasing)
        releasing.add_done_callback(self._releasing.discard)
        await asyncio.wait({releasing}, timeout=RELEASE_SECONDS)

    def _stored(self, media_ids: Iterable[str]) -> set[str]:
        """Return the ids in the database of the media that are stored already."""
        return {self._row_id(media_id) for media_id in media_ids if self._store.exists(media_id)}

    def _add_leases(
        self, sizes: Mapping[str, int], stored: set[str], holder: str, session: Session, now: float
    ) -> None:
        """Lease media by id. A media item that is stored without a row was uploaded by a client, if no sweep deletes it."""
        known = _lock(session, sizes)
        rows = [
            {"media_id": row_id, "num_bytes": size, "is_uploaded": row_id in stored and self._exists(row_id)}
            for row_id, size in sorted(sizes.items())
            if row_id not in known
        ]
        if rows:
            session.execute(insert(MediaRow), rows)
        leases = [{"holder": holder, "media_id": m, "expires_at": now + LEASE_SECONDS} for m in sorted(sizes)]
        session.execute(insert(LeaseRow), leases)

    def _exists(self, row_id: str) -> bool:
        return self._store.exists(split(row_id)[1])

    async def _store_bytes(self, media: Mapping[str, EncodedMedia], infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Store the bytes in a thread. A cancellation takes effect when the current media item is stored."""
        is_cancelled = threading.Event()
        storing = asyncio.ensure_future(asyncio.to_thread(self._put, media, infos, is_cancelled))
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            is_cancelled.set()
            while not storing.done():  # whether or not there is a second cancellation
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({storing})
            if not storing.cancelled():
                storing.exception()  # asyncio would log it as not retrieved
            raise

    def _put(
        self,
        media: Mapping[str, EncodedMedia],
        infos: Mapping[str, Mapping[str, Any]],
        is_cancelled: threading.Event,
    ) -> None:
        """Store the bytes of the media in `infos`.

        Of the rest, one that has been deleted in the meantime raises `MediaNotFound`, or `LeaseLost` if it was sent.
        """
        for media_id, item in media.items():
            if is_cancelled.is_set():
                return
            if media_id in infos:
                self._store.put(item.data, item.kind, **infos[media_id])
            elif not self._store.exists(media_id):
                raise not_found(media_id, item.param) if item.is_stored else LeaseLost


def _is_referred_to(session: Session, media_id: str) -> bool:
    """Return whether an example of any version refers to it."""
    return bool(session.scalar(select(exists().where(ExampleMediaRow.media_id == media_id))))


def _is_leased(session: Session, media_id: str, now: float) -> bool:
    """Return whether a request in progress is about to refer to it."""
    return bool(session.scalar(select(exists().where(LeaseRow.media_id == media_id, LeaseRow.expires_at > now))))


def total_bytes(session: Session) -> int:
    """Return the number of bytes of all media that support sets refer to."""
    return session.scalar(select(func.coalesce(func.sum(MediaRow.num_bytes), 0)).where(IS_REFERRED_TO)) or 0


def _commit(transaction: Transaction[Result], holder: str, num_media: int, session: Session, now: float) -> Result:
    """Release the leases and run `transaction`. Raises `LeaseLost` if any lease has expired."""
    is_held = (LeaseRow.holder == holder, LeaseRow.expires_at > now)
    if session.execute(delete(LeaseRow).where(*is_held)).rowcount != num_media:  # type: ignore[attr-defined]
        raise LeaseLost
    return transaction(session, now)


def _lock(session: Session, media_ids: Iterable[str]) -> set[str]:
    """Lock the rows of these media against being swept, and return the ids that have one."""
    known: set[str] = set()
    for chunk in chunked(sorted(media_ids)):
        query = select(MediaRow.media_id).where(MediaRow.media_id.in_(chunk)).order_by(MediaRow.media_id)
        known.update(session.scalars(query.with_for_update(read=True, key_share=True)))
    return known


def _delete_rows(session: Session, media_ids: list[str], now: float) -> None:
    """Delete rows of unused media. Foreign keys make it fail if one has been leased or referred to in the meantime."""
    has_expired = (LeaseRow.media_id.in_(media_ids), LeaseRow.expires_at <= now)
    session.execute(delete(LeaseRow).where(*has_expired))
    session.execute(delete(EmbeddingRow).where(EmbeddingRow.key.in_(media_ids)))
    session.execute(delete(MediaRow).where(MediaRow.media_id.in_(media_ids)))
