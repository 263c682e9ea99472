"""Named, versioned sets of worked examples, in the database and the media store until they expire or are deleted.

Every change of examples creates a version, and earlier versions do not change. Media are stored before the database refers
to them, so an acknowledged version is complete. A request that is repeated with its `Idempotency-Key` gets the response of
the first one, and changes nothing: the response is stored in the same transaction as the change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, delete
from sqlalchemy.orm import Session

from server.access.tenants import DEFAULT_TENANT, qualified
from server.errors import IdempotencyConflict, ServerError
from server.store import media_references, summaries, versions
from server.store.database import Database, Transaction, lock_tenant
from server.store.media_references import MediaReferences
from server.store.records import (
    IdempotencyRow,
    NewExample,
    SupportSet,
    SupportSetInfo,
    SupportSetRow,
    Totals,
)
from server.store.retention import delete_old
from server.store.staging import Staging
from server.store.version_cache import VersionCache

# seconds for which the response to a request with an `Idempotency-Key` is kept
RETENTION_SECONDS = 24 * 3600.0
# characters of the labels in a response that is stored for repetitions of its request
MAX_STORED_LABELS = 2**16
# the bytes of recently read versions, in memory: versions never change
MAX_CACHED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The `Idempotency-Key` of a request; `digest` is that of the request's body."""

    key: str
    digest: str


class SupportSets:
    """The support sets of a tenant in a database. `changed` is set when this process has changed a set of any tenant."""

    def __init__(self, database: Database, media: MediaReferences, *, max_examples: int = 10_000) -> None:
        self.changed = asyncio.Event()
        self._database = database
        self._media = media
        self._tenant = DEFAULT_TENANT
        self._max_examples = max_examples
        self._versions = VersionCache(MAX_CACHED_BYTES)

    def of(self, tenant: str, media: MediaReferences) -> SupportSets:
        """Return the support sets of a tenant with these media references; the cache of recent versions is shared."""
        sets = copy(self)
        sets._tenant, sets._media = tenant, media
        return sets

    # reading

    async def get_version(self, id_or_name: str, version: int | None = None) -> SupportSet:
        """Return a version, by default the latest, with its examples. Raises `SupportSetNotFound`."""
        return await self._database.read(partial(self._version, id_or_name, version))

    async def get(self, id_or_name: str, version: int | None = None) -> SupportSetInfo:
        """Return a version, by default the latest, without its examples. Raises `SupportSetNotFound`."""
        return await self._database.read(
            lambda session, now: summaries.info(session, self._find(session, id_or_name, now), version)
        )

    async def page(self, after: str, limit: int, max_characters: float = inf) -> list[SupportSetInfo]:
        """Return the sets that were created after the one with the id `after`, oldest first.

        The list ends with the first set whose labels, with those before it, have more than `max_characters`. The caller
        leaves out that one, unless it is the only one.
        """
        return await self._database.read(
            lambda session, now: summaries.page(session, self._tenant, after, limit, max_characters, now)
        )

    async def versions(self, id_or_name: str, after: int, limit: int) -> Sequence[Row[int, float, int, int, int, int]]:
        """Return the versions after `after`, in order, as rows of columns. Raises `SupportSetNotFound`."""
        return await self._database.read(
            lambda session, now: versions.history(session, self._find(session, id_or_name, now), after, limit)
        )

    async def totals(self) -> Totals:
        return await self._database.read(_totals)

    async def pinned(self) -> dict[str, list[tuple[str, int]]]:
        """Return the ids and latest versions of the pinned sets by tenant, oldest first."""
        return await self._database.read(lambda session, now: versions.latest(session, now, SupportSetRow.is_pinned))

    # changing

    def check_num_examples(self, num_examples: int) -> None:
        """Check, before their media are read, that a set may have so many new examples. Raises `TooManyExamples`."""
        versions.check_num_examples(num_examples, self._max_examples)

    async def create(
        self,
        name: str | None,
        examples: Sequence[NewExample],
        *,
        expires_at: float | None = None,
        is_pinned: bool = False,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: IdempotencyKey | None = None,
        max_sets: int | None = None,
    ) -> SupportSetInfo:
        """Create a set at version 1, unless the tenant has `max_sets` already.

        Raises `NameTaken`, `TooManyExamples`, `TooManySupportSets` and `IdempotencyConflict`.
        """
        staging = Staging(self._database, self._tenant, examples)
        full_name = None if name is None else qualified(self._tenant, name)

        def check(session: Session, now: float) -> None:
            if max_sets is not None:
                versions.check_number(session, self._tenant, now, max_sets)
            if full_name is not None:
                versions.check_name(session, full_name, now)

        def create(session: Session, now: float) -> SupportSetInfo:
            if max_sets is not None:
                lock_tenant(session, self._tenant)  # concurrent transactions would not count each other's sets
            if full_name is not None:
                versions.take_name(session, full_name, now)
            check(session, now)
            row = staging.finish(session, now)
            row.name, row.created_at, row.expires_at = full_name, now, expires_at
            row.is_pinned, row.metadata_ = is_pinned, dict(metadata or {})
            versions.publish(session, row, now, self._max_examples)
            return _info(session, row, examples)

        return await self._store(examples, staging, create, qualified(self._tenant, ""), idempotency_key, check)

    async def put_examples(
        self,
        id_or_name: str,
        examples: Sequence[NewExample],
        *,
        expected_version: int | None = None,
        idempotency_key: IdempotencyKey | None = None,
    ) -> SupportSetInfo:
        """Create the next version: an example whose id exists is replaced, others are appended.

        Raises `SupportSetNotFound`, `VersionConflict`, `TooManyExamples` and `IdempotencyConflict`.
        """
        staging = Staging(self._database, self._tenant, examples)

        def put(session: Session, now: float) -> SupportSetInfo:
            row = self._find(session, set_id, now, lock=True, expected_version=expected_version)
            versions.merge(session, row, staging.finish(session, now), now, self._max_examples)
            return _info(session, row, examples)

        set_id = await self._database.read(lambda session, now: self._find(session, id_or_name, now).id)
        return await self._store(examples, staging, put, set_id, idempotency_key)

    async def remove_examples(
        self, id_or_name: str, ids: Sequence[str], *, expected_version: int | None = None
    ) -> SupportSetInfo:
        """Create the next version, without these examples. Raises `ExampleNotFound`, and what `delete` raises."""
        return await self._change(id_or_name, expected_version, partial(versions.remove_examples, ids=ids))

    async def update(
        self, id_or_name: str, changes: Mapping[str, Any], *, expected_version: int | None = None
    ) -> SupportSetInfo:
        """Change name, expires_at, is_pinned or metadata in place. Raises `NameTaken`, and what `delete` raises."""
        return await self._change(id_or_name, expected_version, partial(versions.update_set, changes=changes))

    async def delete(self, id_or_name: str, *, expected_version: int | None = None) -> str:
        """Delete a set and return its id; a sweep deletes its media. Raises `SupportSetNotFound` and `VersionConflict`."""

        def delete(session: Session, now: float) -> str:
            row = self._find(session, id_or_name, now, lock=True, expected_version=expected_version)
            session.delete(row)
            return row.id

        set_id = await self._database.write(delete)
        self.changed.set()
        return set_id

    async def sweep(self) -> None:
        """Delete data of all tenants that are no longer needed.

        These are expired sets, old responses to requests with an `Idempotency-Key`, and media of deleted sets.
        """
        await self._database.sweep(versions.delete_expired)
        await delete_old(self._database, IdempotencyRow, RETENTION_SECONDS)
        await self._media.sweep()

    async def _change(
        self, id_or_name: str, expected_version: int | None, change: Callable[[Session, SupportSetRow, float], None]
    ) -> SupportSetInfo:
        def transaction(session: Session, now: float) -> SupportSetInfo:
            row = self._find(session, id_or_name, now, lock=True, expected_version=expected_version)
            change(session, row, now)
            return summaries.info(session, row)

        info = await self._database.write(transaction)
        self.changed.set()
        return info

    async def _store(
        self,
        examples: Sequence[NewExample],
        staging: Staging,
        change: Transaction[SupportSetInfo],
        scope: str,
        key: IdempotencyKey | None,
        check: Transaction[None] | None = None,
    ) -> SupportSetInfo:
        """Store examples, or return the answer to the first request with this key, after which a request stores nothing.

        A key counts within a scope: the id of the set that the request changes, or the tenant if it creates one.
        """
        if key is None:
            return await self._store_new(examples, staging, change, check)
        first = partial(_first_answer, scope, key)
        if (answer := await self._database.read(first)) is not None:
            return answer
        try:
            return await self._store_new(examples, staging, partial(_once, change, scope, key), check)
        except ServerError:
            # the first request may have changed the set since, for example taken the name
            if (answer := await self._database.read(first)) is not None:
                return answer
            raise

    async def _store_new(
        self,
        examples: Sequence[NewExample],
        staging: Staging,
        change: Transaction[SupportSetInfo],
        check: Transaction[None] | None,
    ) -> SupportSetInfo:
        """Store the media of the examples, and run the change that refers to them.

        If `check` refuses the request, its media are not even decoded.
        """
        if check is not None:
            await self._database.read(check)
        distinct = dict.fromkeys(media for example in examples for media in example.media)
        media = {media.id: media for media in distinct}
        try:
            info = await self._media.write(media, change, staging.store)
            self.changed.set()
            return info
        except asyncio.CancelledError:
            self.changed.set()  # a transaction that has begun was completed
            raise
        finally:
            await staging.discard()

    def _find(
        self,
        session: Session,
        id_or_name: str,
        now: float,
        *,
        lock: bool = False,
        expected_version: int | None = None,
    ) -> SupportSetRow:
        return versions.find(session, self._tenant, id_or_name, now, lock=lock, expected_version=expected_version)

    def _version(self, id_or_name: str, version: int | None, session: Session, now: float) -> SupportSet:
        row = self._find(session, id_or_name, now)
        number = versions.check_version(row, version)
        examples = self._versions.find((row.id, number), lambda: versions.examples(session, row.id, number))
        return SupportSet(id=row.id, name=versions.own_name(row), version=number, examples=examples)


def _totals(session: Session, now: float) -> Totals:
    latest = {tenant: frozenset(sets) for tenant, sets in versions.latest(session, now).items()}
    return Totals(latest, media_references.total_bytes(session))


def _info(session: Session, row: SupportSetRow, examples: Sequence[NewExample]) -> SupportSetInfo:
    return replace(summaries.info(session, row), example_ids=tuple(example.id for example in examples))


def _first_answer(scope: str, key: IdempotencyKey, session: Session, now: float) -> SupportSetInfo | None:
    """Return the answer to the first request with this key. Raises `IdempotencyConflict` if it was another request.

    Many labels were not stored with it. They are those of the version, which never changes, or none if the set was deleted
    meanwhile.
    """
    row = session.get(IdempotencyRow, (scope, key.key))
    if row is None or row.created_at < now - RETENTION_SECONDS:
        return None
    if row.request_digest != key.digest:
        raise IdempotencyConflict("this Idempotency-Key was sent with a different request")
    answer = msgspec.convert(row.answer, SupportSetInfo)
    counts = answer.label_counts or summaries.label_counts(session, answer.id, answer.version)
    return replace(answer, label_counts=counts)


def _once(
    change: Transaction[SupportSetInfo], scope: str, key: IdempotencyKey, session: Session, now: float
) -> SupportSetInfo:
    """Run `change` unless the key has a response. A concurrent first request makes the insert fail, as intended."""
    if (first := _first_answer(scope, key, session, now)) is not None:
        return first
    info = change(session, now)
    is_this = IdempotencyRow.scope == scope, IdempotencyRow.key == key.key
    session.execute(delete(IdempotencyRow).where(*is_this, _is_old(now)))
    # without many labels: all those of the set in each answer would be many times the bytes of the requests
    is_small = info.num_label_characters <= MAX_STORED_LABELS
    answer = msgspec.to_builtins(info if is_small else replace(info, label_counts={}))
    session.add(IdempotencyRow(scope=scope, key=key.key, request_digest=key.digest, answer=answer, created_at=now))
    return info


def _is_old(now: float) -> ColumnElement[bool]:
    return IdempotencyRow.created_at < now - RETENTION_SECONDS
