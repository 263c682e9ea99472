"""Support sets and their versions as rows: functions of a session, each part of one transaction.

A change locks its set's row, so version numbers follow each other without a gap whichever process makes them. An
expired set is gone for every function here, swept or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from server.errors import ExampleNotFound, NameTaken, SupportSetNotFound, TooManyExamples, VersionConflict
from server.store.records import Example, NewExample, SupportSetInfo, VersionInfo
from server.store.tables import ExampleMediaRow, ExampleRow, MediaRow, SupportSetRow, VersionRow

# parameters of one statement: SQLite takes 32766
MAX_PARAMETERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a support set is made of, but for its examples."""

    id: str
    name: str | None
    expires_at: float | None
    is_pinned: bool
    metadata: dict[str, Any]


def add_set(session: Session, draft: Draft, now: float) -> SupportSetRow:
    """An empty set of version 0. Raises `NameTaken`."""
    if draft.name is not None:
        free_name(session, draft.name, now)
    row = SupportSetRow(
        id=draft.id,
        name=draft.name,
        version=0,
        created_at=now,
        updated_at=now,
        expires_at=draft.expires_at,
        is_pinned=draft.is_pinned,
        next_place=0,
        metadata_=draft.metadata,
    )
    session.add(row)
    session.flush()
    return row


def free_name(session: Session, name: str, now: float) -> None:
    """Raises `NameTaken`; a set that has expired loses its name."""
    expired = (SupportSetRow.name == name, SupportSetRow.expires_at <= now)
    session.execute(delete(SupportSetRow).where(*expired))
    if session.scalar(select(SupportSetRow.id).where(SupportSetRow.name == name)) is not None:
        raise NameTaken(f"there is a support set {name!r} already", param="name")


def find(session: Session, id_or_name: str, now: float, *, lock: bool = False) -> SupportSetRow:
    """Raises `SupportSetNotFound`. With `lock`, nobody else changes the set until this transaction ends."""
    if "\0" in id_or_name:  # PostgreSQL would not even look for it
        raise SupportSetNotFound("there is no support set of this name")
    named = or_(SupportSetRow.id == id_or_name, SupportSetRow.name == id_or_name)
    query = select(SupportSetRow).where(named, _is_alive(now))
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise SupportSetNotFound(f"there is no support set {id_or_name[:128]!r}")
    return row


def find_expected(session: Session, id_or_name: str, expected_version: int | None, now: float) -> SupportSetRow:
    """Locked. Raises `VersionConflict` when the latest version is another."""
    row = find(session, id_or_name, now, lock=True)
    if expected_version not in (None, row.version):
        message = f"the support set is at version {row.version}, not {expected_version}"
        raise VersionConflict(message, param="expected_version")
    return row


def page(session: Session, after: str, limit: int, now: float) -> list[SupportSetInfo]:
    """Sets in the order of their creation, those behind the id `after`."""
    query = select(SupportSetRow).where(SupportSetRow.id > after, _is_alive(now)).order_by(SupportSetRow.id)
    return infos(session, list(session.scalars(query.limit(limit))))


def latest(session: Session, now: float) -> list[tuple[str, int]]:
    """Ids and latest versions of all sets, the oldest first."""
    query = select(SupportSetRow.id, SupportSetRow.version).where(_is_alive(now))
    return [(row.id, row.version) for row in session.execute(query.order_by(SupportSetRow.id))]


def pinned(session: Session, now: float) -> list[tuple[str, int]]:
    """The same of the pinned ones."""
    query = select(SupportSetRow.id, SupportSetRow.version).where(SupportSetRow.is_pinned, _is_alive(now))
    return [(row.id, row.version) for row in session.execute(query.order_by(SupportSetRow.id))]


def delete_expired(session: Session, now: float) -> int:
    done = session.execute(delete(SupportSetRow).where(SupportSetRow.expires_at <= now))
    return int(done.rowcount)  # type: ignore[attr-defined]


def update_set(session: Session, row: SupportSetRow, changes: Mapping[str, Any], now: float) -> None:
    """`changes`: any of name, expires_at, is_pinned, metadata. Raises `NameTaken`."""
    name = changes.get("name")
    if name is not None and name != row.name:
        free_name(session, name, now)
    for field, value in changes.items():
        setattr(row, "metadata_" if field == "metadata" else field, value)
    row.updated_at = now
    session.flush()


def put_examples(
    session: Session, row: SupportSetRow, examples: Sequence[NewExample], max_examples: int, now: float
) -> None:
    """The next version: an example whose id is there replaces that one in its place, others are appended.
    Raises `TooManyExamples`."""
    old = _places(session, row, {example.id for example in examples})
    num_examples = _num_examples(session, row) + len(examples) - len(old)
    if num_examples > max_examples:
        message = f"the support set would have {num_examples} examples, the limit is {max_examples}"
        raise TooManyExamples(message, param="examples")
    _begin_version(session, row, num_examples, now, added=len(examples) - len(old), replaced=len(old))
    _end(session, row, list(old))
    _insert(session, row, examples, old)


def remove_examples(session: Session, row: SupportSetRow, ids: Sequence[str], now: float) -> None:
    """The next version, without these. Raises `ExampleNotFound` that names the missing ones."""
    found = _places(session, row, set(ids))
    if missing := [example_id for example_id in ids if example_id not in found]:
        raise ExampleNotFound(f"the support set has no example {', '.join(map(repr, missing[:20]))}", param="id")
    _begin_version(session, row, _num_examples(session, row) - len(found), now, removed=len(found))
    _end(session, row, list(found))


def check_version(session: Session, row: SupportSetRow, version: int | None) -> int:
    """The version that is meant, none: the latest. Raises `SupportSetNotFound`."""
    if version is None or 1 <= version <= row.version:
        return row.version if version is None else version
    message = f"the support set {row.id!r} has versions 1 to {row.version}, not {version}"
    raise SupportSetNotFound(message, param="version")


def examples(session: Session, set_id: str, version: int) -> tuple[Example, ...]:
    in_version = _in_version(set_id, version)
    media: dict[int, list[str]] = {}
    shown = select(ExampleMediaRow.row_id, ExampleMediaRow.media_id).join(
        ExampleRow, ExampleRow.row_id == ExampleMediaRow.row_id
    )
    for row_id, media_id in session.execute(
        shown.where(*in_version).order_by(ExampleMediaRow.row_id, ExampleMediaRow.place)
    ):
        media.setdefault(row_id, []).append(media_id)
    rows = session.scalars(select(ExampleRow).where(*in_version).order_by(ExampleRow.place))
    return tuple(
        Example(row.example_id, tuple(media.get(row.row_id, ())), row.text, row.label, row.question, row.metadata_)
        for row in rows
    )


def infos(session: Session, rows: Sequence[SupportSetRow], version: int | None = None) -> list[SupportSetInfo]:
    """One record a row, of its latest version or, for a single row, of `version`."""
    return [_info(session, row, row.version if version is None else version) for row in rows]


def versions(session: Session, row: SupportSetRow, after: int, limit: int) -> list[VersionInfo]:
    query = select(VersionRow).where(VersionRow.set_id == row.id, VersionRow.version > after)
    found = session.scalars(query.order_by(VersionRow.version).limit(limit))
    return [
        VersionInfo(
            version=found_row.version,
            created_at=found_row.created_at,
            num_examples=found_row.num_examples,
            num_added=found_row.num_added,
            num_replaced=found_row.num_replaced,
            num_removed=found_row.num_removed,
        )
        for found_row in found
    ]


def _is_alive(now: float) -> ColumnElement[bool]:
    return or_(SupportSetRow.expires_at.is_(None), SupportSetRow.expires_at > now)


def _in_version(set_id: str, version: int) -> tuple[ColumnElement[bool], ...]:
    has_ended_later = or_(ExampleRow.end_version.is_(None), ExampleRow.end_version > version)
    return ExampleRow.set_id == set_id, ExampleRow.first_version <= version, has_ended_later


def _info(session: Session, row: SupportSetRow, version: int) -> SupportSetInfo:
    shown = (
        select(ExampleMediaRow.media_id)
        .join(ExampleRow, ExampleRow.row_id == ExampleMediaRow.row_id)
        .where(*_in_version(row.id, version))
    )
    total = func.coalesce(func.sum(MediaRow.num_bytes), 0)
    counted = session.execute(select(func.count(), total).where(MediaRow.media_id.in_(shown))).one()
    return SupportSetInfo(
        id=row.id,
        name=row.name,
        version=version,
        latest_version=row.version,
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at,
        is_pinned=row.is_pinned,
        metadata=row.metadata_,
        num_examples=session.get_one(VersionRow, (row.id, version)).num_examples,
        num_media=counted[0],
        num_bytes=int(counted[1]),
        label_counts=_label_counts(session, row.id, version),
    )


def _label_counts(session: Session, set_id: str, version: int) -> dict[str, int]:
    counted = select(ExampleRow.label, func.count()).where(*_in_version(set_id, version), ExampleRow.label != "")
    rows = session.execute(counted.group_by(ExampleRow.label).order_by(func.min(ExampleRow.place)))
    return dict(rows.all())  # a result has keys, but is no mapping


def _num_examples(session: Session, row: SupportSetRow) -> int:
    return session.get_one(VersionRow, (row.id, row.version)).num_examples if row.version else 0


def _places(session: Session, row: SupportSetRow, ids: set[str]) -> dict[str, int]:
    """Places, in the latest version, of those of these examples that are in it."""
    found: dict[str, int] = {}
    for some in _portions(sorted(name for name in ids if "\0" not in name)):
        query = select(ExampleRow.example_id, ExampleRow.place).where(
            *_in_version(row.id, row.version), ExampleRow.example_id.in_(some)
        )
        found.update((example_id, place) for example_id, place in session.execute(query))
    return found


def _begin_version(
    session: Session,
    row: SupportSetRow,
    num_examples: int,
    now: float,
    *,
    added: int = 0,
    replaced: int = 0,
    removed: int = 0,
) -> None:
    row.version += 1
    row.updated_at = now
    session.add(
        VersionRow(
            set_id=row.id,
            version=row.version,
            created_at=now,
            num_examples=num_examples,
            num_added=added,
            num_replaced=replaced,
            num_removed=removed,
        )
    )
    session.flush()


def _end(session: Session, row: SupportSetRow, ids: Sequence[str]) -> None:
    """Of the version that has just begun, these are no part any more."""
    for some in _portions(ids):
        ended = update(ExampleRow).where(
            ExampleRow.set_id == row.id, ExampleRow.end_version.is_(None), ExampleRow.example_id.in_(some)
        )
        session.execute(ended.values(end_version=row.version), execution_options={"synchronize_session": False})


def _insert(session: Session, row: SupportSetRow, examples: Sequence[NewExample], places: dict[str, int]) -> None:
    new = [
        {
            "set_id": row.id,
            "example_id": example.id,
            "place": places.get(example.id, row.next_place + number),
            "first_version": row.version,
            "end_version": None,
            "text": example.text,
            "question": example.question,
            "label": example.label,
            "metadata_": example.metadata,
        }
        for number, example in enumerate(examples)
    ]
    row.next_place += len(examples)
    if not new:
        return
    row_ids = session.scalars(insert(ExampleRow).returning(ExampleRow.row_id, sort_by_parameter_order=True), new)
    shown = [
        {"row_id": row_id, "place": place, "media_id": media.id}
        for row_id, example in zip(row_ids, examples, strict=True)
        for place, media in enumerate(example.media)
    ]
    if shown:
        session.execute(insert(ExampleMediaRow), shown)


def _portions(ids: Sequence[str]) -> Iterator[Iterable[str]]:
    for start in range(0, len(ids), MAX_PARAMETERS):
        yield ids[start : start + MAX_PARAMETERS]
