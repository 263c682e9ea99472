"""Support sets and their versions as rows: functions of a session, each of which is part of a transaction.

A change locks the row of its set, so version numbers have no gaps, whichever process assigns them. A set that has expired,
swept or not, does not exist for readers, and neither does one without a version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    ColumnExpressionArgument,
    Row,
    Text,
    and_,
    cast,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy import insert as insert_into
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from server.access.tenants import qualified, split
from server.errors import (
    ExampleNotFound,
    NameTaken,
    SupportSetNotFound,
    TooManyExamples,
    TooManySupportSets,
    VersionConflict,
)
from server.store.database import chunked
from server.store.examples import Examples
from server.store.records import (
    Example,
    ExampleMediaRow,
    ExampleRow,
    NewExample,
    SupportSetRow,
    VersionRow,
)

# these statements affect no row that is loaded in the session
UNSYNCHRONIZED = {"synchronize_session": False}
# expired sets that are deleted in one transaction, for which other writers wait
SETS_PER_TRANSACTION = 4


def find(
    session: Session,
    tenant: str,
    id_or_name: str,
    now: float,
    *,
    lock: bool = False,
    expected_version: int | None = None,
) -> SupportSetRow:
    """Return the row of a tenant's set. `lock` keeps other transactions from changing it until this one ends.

    Raises `SupportSetNotFound`, and `VersionConflict` if the latest version is not `expected_version`.
    """
    if "\0" in id_or_name:  # PostgreSQL rejects such a parameter
        raise SupportSetNotFound("no support set has this name")
    is_named = or_(SupportSetRow.id == id_or_name, SupportSetRow.name == qualified(tenant, id_or_name))
    query = select(SupportSetRow).where(SupportSetRow.tenant == tenant, is_named, is_alive(now))
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise SupportSetNotFound(f"no support set {id_or_name[:128]!r}")
    if expected_version not in (None, row.version):
        message = f"the support set is at version {row.version}, not {expected_version}"
        raise VersionConflict(message, param="expected_version")
    return row


def latest(
    session: Session, now: float, *conditions: ColumnExpressionArgument[bool]
) -> dict[str, list[tuple[str, int]]]:
    """Return the ids and latest versions of all sets that meet the conditions by tenant, oldest first."""
    query = select(SupportSetRow.tenant, SupportSetRow.id, SupportSetRow.version).where(is_alive(now), *conditions)
    by_tenant: dict[str, list[tuple[str, int]]] = {}
    for row in session.execute(query.order_by(SupportSetRow.id)):
        by_tenant.setdefault(row.tenant, []).append((row.id, row.version))
    return by_tenant


def check_number(session: Session, tenant: str, now: float, max_sets: int) -> None:
    """Raise `TooManySupportSets` if a tenant has as many sets as it may."""
    query = select(func.count()).select_from(SupportSetRow).where(SupportSetRow.tenant == tenant, is_alive(now))
    if (session.scalar(query) or 0) >= max_sets:
        raise TooManySupportSets(f"the key's limit of support sets, {max_sets}, is reached")


def delete_expired(session: Session, now: float) -> int:
    """Delete some expired sets, and return their number, 0 if there are none."""
    query = select(SupportSetRow.id).where(SupportSetRow.expires_at <= now).limit(SETS_PER_TRANSACTION)
    expired = session.scalars(query).all()
    # again with the time: PostgreSQL checks it once more for a set that another transaction has extended meanwhile
    is_expired = (SupportSetRow.id.in_(expired), SupportSetRow.expires_at <= now)
    session.execute(delete(SupportSetRow).where(*is_expired), execution_options=UNSYNCHRONIZED)
    return len(expired)


def update_set(session: Session, row: SupportSetRow, now: float, changes: Mapping[str, Any]) -> None:
    """Change any of name, expires_at, is_pinned and metadata. Raises `NameTaken`."""
    if (name := changes.get("name")) is not None:
        name = qualified(row.tenant, name)
        if name != row.name:
            take_name(session, name, now)
        changes = {**changes, "name": name}
    for field, value in changes.items():
        setattr(row, "metadata_" if field == "metadata" else field, value)
    row.updated_at = now
    session.flush()


def insert(session: Session, row: SupportSetRow, examples: Sequence[NewExample]) -> None:
    """Insert examples at the end of a set that has no version yet."""
    rows = [
        {
            "set_id": row.id,
            "example_id": example.id,
            "position": row.next_position + index,
            "first_version": 1,
            "end_version": None,
            "text": example.text,
            "question": example.question,
            "label": example.label,
            "metadata_": example.metadata,
        }
        for index, example in enumerate(examples)
    ]
    row.next_position += len(examples)
    if not rows:
        return
    row_ids = session.scalars(insert_into(ExampleRow).returning(ExampleRow.row_id, sort_by_parameter_order=True), rows)
    references = [
        {"row_id": row_id, "position": position, "media_id": qualified(row.tenant, media.id)}
        for row_id, example in zip(row_ids, examples, strict=True)
        for position, media in enumerate(example.media)
    ]
    if references:
        session.execute(insert_into(ExampleMediaRow), references)


def publish(session: Session, row: SupportSetRow, now: float, max_examples: int) -> None:
    """Create the first version of a set, with the inserted examples. Raises `TooManyExamples`."""
    num_examples = row.next_position
    check_num_examples(num_examples, max_examples)
    _begin_version(session, row, now, num_examples=num_examples, num_added=num_examples)


def merge(session: Session, row: SupportSetRow, staged: SupportSetRow, now: float, max_examples: int) -> None:
    """Create the next version with the examples of `staged`, a set without a version, which is removed.

    Examples whose ids exist are replaced, others appended. Raises `TooManyExamples`.
    """
    old, new = aliased(ExampleRow), aliased(ExampleRow)
    ids = select(new.example_id).where(new.set_id == staged.id)
    is_replaced = (*in_version(row.id, row.version), ExampleRow.example_id.in_(ids))
    num_replaced = session.scalar(select(func.count()).select_from(ExampleRow).where(*is_replaced)) or 0
    num_added = staged.next_position - num_replaced
    num_examples = _num_examples(session, row) + num_added
    check_num_examples(num_examples, max_examples)
    _begin_version(session, row, now, num_examples=num_examples, num_added=num_added, num_replaced=num_replaced)
    _end(session, row, ExampleRow.example_id.in_(ids))
    # a new example gets the position of the one that it replaces
    left = (old.set_id == row.id, old.example_id == ExampleRow.example_id, old.end_version == row.version)
    position = func.coalesce(
        select(old.position).where(*left).correlate(ExampleRow).scalar_subquery(),
        row.next_position + ExampleRow.position,
    )
    moved = update(ExampleRow).where(ExampleRow.set_id == staged.id)
    session.execute(
        moved.values(set_id=row.id, first_version=row.version, position=position), execution_options=UNSYNCHRONIZED
    )
    row.next_position += staged.next_position
    session.execute(delete(SupportSetRow).where(SupportSetRow.id == staged.id), execution_options=UNSYNCHRONIZED)


def remove_examples(session: Session, row: SupportSetRow, now: float, ids: Sequence[str]) -> None:
    """Create the next version without these examples. Raises `ExampleNotFound`, which lists the missing ids."""
    removed = _present(session, row, set(ids))
    if missing := [example_id for example_id in ids if example_id not in removed]:
        raise ExampleNotFound(f"the support set has no example {', '.join(map(repr, missing[:20]))}", param="id")
    num_examples = _num_examples(session, row) - len(removed)
    _begin_version(session, row, now, num_examples=num_examples, num_removed=len(removed))
    for chunk in chunked(list(removed)):
        _end(session, row, ExampleRow.example_id.in_(chunk))


def check_version(row: SupportSetRow, version: int | None) -> int:
    """Return the version, by default the latest. Raises `SupportSetNotFound`."""
    if version is None:
        return row.version
    if not 1 <= version <= row.version:
        message = f"the support set has versions 1 to {row.version}, not {version}"
        raise SupportSetNotFound(message, param="version")
    return version


def examples(session: Session, set_id: str, version: int) -> Examples[Example]:
    """Return the examples of a version, in order."""
    media: dict[int, list[str]] = {}
    is_in_version = in_version(set_id, version)
    references = select(ExampleMediaRow.row_id, ExampleMediaRow.media_id).where(*is_in_version)
    references = references.join(ExampleRow, ExampleRow.row_id == ExampleMediaRow.row_id)
    for row_id, media_id in session.execute(references.order_by(ExampleMediaRow.row_id, ExampleMediaRow.position)):
        media.setdefault(row_id, []).append(split(media_id)[1])
    texts = (ExampleRow.text, ExampleRow.label, ExampleRow.question, cast(ExampleRow.metadata_, Text))
    rows = select(ExampleRow.row_id, ExampleRow.example_id, *texts).where(*is_in_version)
    examples = Examples(
        Example(example_id, tuple(media.get(row_id, ())), *texts)
        for row_id, example_id, *texts in session.execute(rows.order_by(ExampleRow.position))
    )
    _ = examples.by_answer  # computed here, in a thread of the database, and not in the event loop
    return examples


def history(
    session: Session, row: SupportSetRow, after: int, limit: int
) -> Sequence[Row[int, float, int, int, int, int]]:
    """Return the versions after `after`, in order, as the columns that clients see."""
    counts = (VersionRow.num_examples, VersionRow.num_added, VersionRow.num_replaced, VersionRow.num_removed)
    query = select(VersionRow.version, VersionRow.created_at, *counts).where(VersionRow.set_id == row.id)
    return session.execute(query.where(VersionRow.version > after).order_by(VersionRow.version).limit(limit)).all()


def own_name(row: SupportSetRow) -> str | None:
    """Return the name of a set as its tenant sees it."""
    return None if row.name is None else split(row.name)[1]


def check_name(session: Session, name: str, now: float) -> None:
    """Raise `NameTaken` unless the qualified name is free."""
    if session.scalar(select(SupportSetRow.id).where(SupportSetRow.name == name, is_alive(now))) is not None:
        raise NameTaken(f"the name {split(name)[1]!r} is taken by another support set", param="name")


def take_name(session: Session, name: str, now: float) -> None:
    """Take the qualified name from a set that has expired. Raises `NameTaken` unless it is free then."""
    session.execute(delete(SupportSetRow).where(SupportSetRow.name == name, SupportSetRow.expires_at <= now))
    check_name(session, name, now)


def is_alive(now: float) -> ColumnElement[bool]:
    """Return the condition for sets that exist for readers at a time."""
    return and_(SupportSetRow.version > 0, or_(SupportSetRow.expires_at.is_(None), SupportSetRow.expires_at > now))


def in_version(
    set_id: str | InstrumentedAttribute[str], version: int | InstrumentedAttribute[int]
) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for the examples of a version, whose set and number may be columns of another table."""
    ends_later = or_(ExampleRow.end_version.is_(None), ExampleRow.end_version > version)
    return ExampleRow.set_id == set_id, ExampleRow.first_version <= version, ends_later


def _num_examples(session: Session, row: SupportSetRow) -> int:
    return session.get_one(VersionRow, (row.id, row.version)).num_examples if row.version else 0


def check_num_examples(num_examples: int, max_examples: int) -> None:
    """Check that a set may have as many examples. Raises `TooManyExamples`."""
    if num_examples > max_examples:
        message = f"the support set would have {num_examples} examples, the limit is {max_examples}"
        raise TooManyExamples(message, param="examples")


def _present(session: Session, row: SupportSetRow, ids: set[str]) -> set[str]:
    """Return the subset of `ids` that examples of the latest version have."""
    present = set[str]()
    for chunk in chunked(sorted(example_id for example_id in ids if "\0" not in example_id)):
        query = select(ExampleRow.example_id).where(*in_version(row.id, row.version))
        present.update(session.scalars(query.where(ExampleRow.example_id.in_(chunk))))
    return present


def _begin_version(session: Session, row: SupportSetRow, now: float, **counts: int) -> None:
    row.version += 1
    row.updated_at = now
    session.add(VersionRow(set_id=row.id, version=row.version, created_at=now, **counts))
    session.flush()


def _end(session: Session, row: SupportSetRow, condition: ColumnElement[bool]) -> None:
    """Exclude the examples that meet the condition from the new version."""
    ended = update(ExampleRow).where(ExampleRow.set_id == row.id, ExampleRow.end_version.is_(None), condition)
    session.execute(ended.values(end_version=row.version), execution_options=UNSYNCHRONIZED)
