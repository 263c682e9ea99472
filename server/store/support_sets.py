"""Named, versioned sets of worked examples, kept in the database and the media store until they expire or are deleted.

Every change of examples makes a new version, and old versions stay as they were. Media are in the store before the
database refers to them, so what is acknowledged is whole. All methods of `SupportSets` leave the event loop free.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from server.errors import Unavailable
from server.media.store import MediaStore
from server.store import embeddings, versions
from server.store import idempotency as idempotency
from server.store import media_references as media_references
from server.store.database import Database
from server.store.idempotency import IdempotencyKey
from server.store.media_import import MediaDecoder, MediaImport
from server.store.media_references import LeaseLost
from server.store.records import Example, NewExample, SupportSet, SupportSetInfo, VersionInfo
from server.store.tables import SupportSetRow
from server.store.versions import Draft

__all__ = ["Example", "IdempotencyKey", "SupportSet", "SupportSetInfo", "SupportSets", "Totals"]

ID_PREFIX = "ss_"
# examples of versions read lately, in memory: versions never change
MAX_REMEMBERED_EXAMPLES = 50_000
MAX_LEASES = 3

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Totals:
    """Ids and latest versions of all sets; bytes of all media that they refer to."""

    latest: list[tuple[str, int]]
    num_bytes: int


class SupportSets:
    """`decoder`: media that come with examples are decoded once before they are stored; None: stored unseen."""

    def __init__(
        self,
        database: Database,
        media_store: MediaStore,
        decoder: MediaDecoder | None = None,
        *,
        max_examples: int = 10_000,
    ) -> None:
        self.database = database
        self.media_store = media_store
        # set when this process has changed a set
        self.changed = asyncio.Event()
        self._media_import = MediaImport(database, media_store, decoder)
        self._max_examples = max_examples
        self._remembering = threading.Lock()
        self._remembered: OrderedDict[tuple[str, int], tuple[Example, ...]] = OrderedDict()

    # reading

    async def get_version(self, id_or_name: str, version: int | None = None) -> SupportSet:
        """With its examples; none: the latest version. Raises `SupportSetNotFound`."""
        return await self._read(partial(self._version, id_or_name, version))

    async def get(self, id_or_name: str, version: int | None = None) -> SupportSetInfo:
        """Raises `SupportSetNotFound`."""
        return await self._read(partial(_get, id_or_name, version))

    async def page(self, after: str, limit: int) -> list[SupportSetInfo]:
        """The next sets behind the id `after`, in the order of their creation."""
        return await self._read(lambda session, now: versions.page(session, after, limit, now))

    async def versions(self, id_or_name: str, after: int, limit: int) -> list[VersionInfo]:
        """Raises `SupportSetNotFound`."""
        return await self._read(lambda s, now: versions.versions(s, versions.find(s, id_or_name, now), after, limit))

    async def totals(self) -> Totals:
        return await self._read(_totals)

    async def pinned(self) -> list[tuple[str, int]]:
        """Ids and latest versions of the sets that shall stay on the device, the oldest first."""
        return await self._read(versions.pinned)

    # changing

    async def create(
        self,
        name: str | None,
        examples: Sequence[NewExample],
        *,
        expires_at: float | None = None,
        is_pinned: bool = False,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: IdempotencyKey | None = None,
    ) -> SupportSetInfo:
        """Version 1 of a new set. Raises `NameTaken`, `TooManyExamples`, `IdempotencyConflict`."""
        draft = Draft(
            id=_new_id(), name=name, expires_at=expires_at, is_pinned=is_pinned, metadata=dict(metadata or {})
        )

        def change(session: Session, now: float) -> SupportSetInfo:
            row = versions.add_set(session, draft, now)
            return self._put(session, row, examples, now)

        return await self._store(examples, change, "", idempotency_key)

    async def put_examples(
        self,
        id_or_name: str,
        examples: Sequence[NewExample],
        *,
        expected_version: int | None = None,
        idempotency_key: IdempotencyKey | None = None,
    ) -> SupportSetInfo:
        """The next version, with these appended or, where their id is there, replaced. Raises `SupportSetNotFound`,
        `VersionConflict`, `TooManyExamples`, `IdempotencyConflict`."""

        def change(session: Session, now: float) -> SupportSetInfo:
            row = versions.find_expected(session, id_or_name, expected_version, now)
            return self._put(session, row, examples, now)

        scope = (await self.get(id_or_name)).id
        return await self._store(examples, change, scope, idempotency_key)

    async def remove_examples(
        self, id_or_name: str, ids: Sequence[str], *, expected_version: int | None = None
    ) -> SupportSetInfo:
        """The next version, without these. Raises `SupportSetNotFound`, `ExampleNotFound`, `VersionConflict`."""

        def change(session: Session, now: float) -> SupportSetInfo:
            row = versions.find_expected(session, id_or_name, expected_version, now)
            versions.remove_examples(session, row, ids, now)
            return versions.infos(session, [row])[0]

        return await self._change(change)

    async def update(
        self, id_or_name: str, changes: Mapping[str, Any], *, expected_version: int | None = None
    ) -> SupportSetInfo:
        """`changes`: any of name, expires_at, is_pinned, metadata. The version stays. Raises `SupportSetNotFound`,
        `NameTaken`, `VersionConflict`."""

        def change(session: Session, now: float) -> SupportSetInfo:
            row = versions.find_expected(session, id_or_name, expected_version, now)
            versions.update_set(session, row, changes, now)
            return versions.infos(session, [row])[0]

        return await self._change(change)

    async def delete(self, id_or_name: str, *, expected_version: int | None = None) -> str:
        """Returns the id. Its media go with the next sweep. Raises `SupportSetNotFound`, `VersionConflict`."""

        def change(session: Session, now: float) -> str:
            row = versions.find_expected(session, id_or_name, expected_version, now)
            session.delete(row)
            return row.id

        return await self._change(change)

    async def sweep(self) -> None:
        """Delete expired sets, media that came with sets which are gone, and what was kept for a while only."""
        await self._write(versions.delete_expired)
        await self._write(_forget)
        while await self._write(lambda session, now: media_references.sweep(session, self.media_store, now)):
            pass

    # media

    async def is_used(self, media_id: str) -> bool:
        """Whether a support set shows it: then it may not be deleted."""
        return await self._read(lambda session, now: media_references.is_used(session, media_id, now))

    async def delete_media(self, media_id: str) -> None:
        """From the store. Raises `MediaInUse`, `MediaNotFound`."""
        await self._write(lambda session, now: media_references.delete_media(session, self.media_store, media_id, now))

    async def mark_uploaded(self, media_id: str, num_bytes: int) -> None:
        """A client has stored this media by itself: it stays when the support sets that show it, or will, go."""
        await self._write(lambda session, now: media_references.mark_uploaded(session, media_id, num_bytes))

    # embeddings

    async def embeddings(self, keys: Iterable[str], model: str) -> dict[str, NDArray[np.float32]]:
        """Those that are cached of these media ids or text digests, under the model of this fingerprint."""
        wanted = list(dict.fromkeys(keys))
        return await self._read(lambda session, now: embeddings.get(session, wanted, model))

    async def put_embeddings(self, vectors: Mapping[str, NDArray[np.float32]], model: str) -> None:
        await self._write(lambda session, now: embeddings.put(session, vectors, model, now))

    # transactions

    async def _read(self, work: Callable[[Session, float], Result]) -> Result:
        return await asyncio.to_thread(self.database.read, lambda session: work(session, time.time()))

    async def _write(self, work: Callable[[Session, float], Result]) -> Result:
        return await asyncio.to_thread(self.database.write, lambda session: work(session, time.time()))

    async def _change(self, work: Callable[[Session, float], Result]) -> Result:
        result = await self._write(work)
        self.changed.set()
        return result

    def _put(self, session: Session, row: SupportSetRow, examples: Sequence[NewExample], now: float) -> SupportSetInfo:
        versions.put_examples(session, row, examples, self._max_examples, now)
        return replace(versions.infos(session, [row])[0], example_ids=tuple(example.id for example in examples))

    async def _store(
        self,
        examples: Sequence[NewExample],
        change: Callable[[Session, float], SupportSetInfo],
        scope: str,
        idempotency_key: IdempotencyKey | None,
    ) -> SupportSetInfo:
        """Run a change whose examples bring media: lease, store the bytes, then refer to them and be done."""
        media = {media.id: media for example in examples for media in example.media}

        def commit(holder: str, session: Session, now: float) -> SupportSetInfo:
            if first := idempotency.find(session, scope, idempotency_key, now):
                return first
            media_references.give_back(session, holder, len(media), now)
            info = change(session, now)
            idempotency.keep(session, scope, idempotency_key, info, now)
            return info

        if first := await self._read(lambda session, now: idempotency.find(session, scope, idempotency_key, now)):
            return first
        looks = await self._media_import.inspect(media)
        for _ in range(MAX_LEASES):
            holder = await self._media_import.store(media, looks)
            try:
                return await self._change(partial(commit, holder))
            except LeaseLost:
                continue
        raise Unavailable("the media could not be stored in time")

    def _version(self, id_or_name: str, version: int | None, session: Session, now: float) -> SupportSet:
        row = versions.find(session, id_or_name, now)
        number = versions.check_version(session, row, version)
        key = (row.id, number)
        with self._remembering:
            examples = self._remembered.get(key)
        if examples is None:
            examples = versions.examples(session, row.id, number)
            self._remember(key, examples)
        return SupportSet(id=row.id, name=row.name, version=number, examples=examples)

    def _remember(self, key: tuple[str, int], examples: tuple[Example, ...]) -> None:
        with self._remembering:
            self._remembered[key] = examples
            while sum(map(len, self._remembered.values())) > MAX_REMEMBERED_EXAMPLES:
                self._remembered.popitem(last=False)


def _get(id_or_name: str, version: int | None, session: Session, now: float) -> SupportSetInfo:
    row = versions.find(session, id_or_name, now)
    return versions.infos(session, [row], versions.check_version(session, row, version))[0]


def _new_id() -> str:
    """In the order of time, so that a list by id is a list by age."""
    return f"{ID_PREFIX}{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:16]}"


def _totals(session: Session, now: float) -> Totals:
    return Totals(versions.latest(session, now), media_references.num_bytes(session))


def _forget(session: Session, now: float) -> None:
    idempotency.forget(session, now)
    embeddings.forget(session, now)
