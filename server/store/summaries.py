"""Reads support sets without their examples: the numbers of a version's examples, media and labels, and pages of sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Select, and_, func, select, true, tuple_
from sqlalchemy.orm import Session

from server.store.database import made_at
from server.store.records import ExampleMediaRow, ExampleRow, MediaRow, SupportSetInfo, SupportSetRow, VersionRow
from server.store.versions import check_version, in_version, is_alive, own_name

# Small sets share queries: the first ones of a page, which may end after a few long labels, and further ones. The labels of
# so many examples fit into memory.
FIRST_EXAMPLES, MAX_EXAMPLES = 16, 1000

SetVersion = tuple[SupportSetRow, VersionRow]
# the id of a set, and the number of a version
VersionKey = tuple[str, int]


def info(session: Session, row: SupportSetRow, version: int | None = None) -> SupportSetInfo:
    """Return the record of a version, by default the latest. Raises `SupportSetNotFound`."""
    key = (row.id, check_version(row, version))
    return next(_infos(session, [(row, session.get_one(VersionRow, key))]))


def label_counts(session: Session, set_id: str, version: int) -> dict[str, int]:
    """Return the number of examples by label of a version, in the order of their first examples; none if it was deleted."""
    return _count_labels(session, [(set_id, version)])[set_id]


def page(
    session: Session, tenant: str, after: str, limit: int, max_characters: float, now: float
) -> list[SupportSetInfo]:
    """Return the sets of a tenant that were created after the one with the id `after`, oldest first.

    If that one was deleted, sets that were created while its media were decoded may be listed again. After two sets or
    more, the page ends with the first whose labels exceed `max_characters`, those of all sets added up.
    """
    # an id is older than its set: it is made before the media are decoded
    order = (SupportSetRow.created_at, SupportSetRow.id)
    last = session.scalar(
        select(SupportSetRow.created_at).where(SupportSetRow.tenant == tenant, SupportSetRow.id == after)
    )
    start = made_at(after) if last is None else last
    is_next = tuple_(*order) > (start, after) if after else true()
    is_latest = and_(VersionRow.set_id == SupportSetRow.id, VersionRow.version == SupportSetRow.version)
    query = select(SupportSetRow, VersionRow).join(VersionRow, is_latest).order_by(*order).limit(limit)
    result = session.execute(query.where(SupportSetRow.tenant == tenant, is_next, is_alive(now)))
    sets = [(row, version) for row, version in result]
    listed: list[SupportSetInfo] = []
    num_characters = 0
    for record in (record for group in _groups(sets) for record in _infos(session, group)):
        if num_characters > max_characters and len(listed) > 1:
            break
        listed.append(record)
        num_characters += record.num_label_characters
    return listed


def _groups(sets: Sequence[SetVersion]) -> Iterator[Sequence[SetVersion]]:
    """Divide sets into groups, whose limit of examples doubles up to `MAX_EXAMPLES`; a larger set is a group of its own."""
    first, num_examples, limit = 0, 0, FIRST_EXAMPLES
    for index, (_, version) in enumerate(sets):
        if num_examples + version.num_examples > limit and index > first:
            yield sets[first:index]
            first, num_examples, limit = index, 0, min(2 * limit, MAX_EXAMPLES)
        num_examples += version.num_examples
    if sets:
        yield sets[first:]


def _infos(session: Session, sets: Sequence[SetVersion]) -> Iterator[SupportSetInfo]:
    keys = [(version.set_id, version.version) for _, version in sets]
    media, labels = _count_media(session, keys), _count_labels(session, keys)
    for row, version in sets:
        num_media, num_bytes = media.get(row.id, (0, 0))
        yield SupportSetInfo(
            **{name: getattr(row, name) for name in ("id", "created_at", "updated_at", "expires_at", "is_pinned")},
            name=own_name(row),
            version=version.version,
            latest_version=row.version,
            metadata=row.metadata_,
            num_examples=version.num_examples,
            num_media=num_media,
            num_bytes=num_bytes,
            label_counts=labels[row.id],
        )


def _count_media(session: Session, versions: Sequence[VersionKey]) -> dict[str, tuple[int, int]]:
    """Return the number of distinct media and of their bytes by the id of a set, if it has any."""
    of_examples = _in_versions(versions, VersionRow.set_id, ExampleMediaRow.media_id)
    references = of_examples.join(ExampleMediaRow, ExampleMediaRow.row_id == ExampleRow.row_id).distinct().subquery()
    query = select(references.c.set_id, func.count(), func.sum(MediaRow.num_bytes)).group_by(references.c.set_id)
    counted = session.execute(query.join(MediaRow, MediaRow.media_id == references.c.media_id))
    return {set_id: (num_media, int(num_bytes)) for set_id, num_media, num_bytes in counted}


def _count_labels(session: Session, versions: Sequence[VersionKey]) -> dict[str, dict[str, int]]:
    """Return the number of examples by label, in the order of their first examples, by the id of a set."""
    query = _in_versions(versions, VersionRow.set_id, ExampleRow.label, func.count()).where(ExampleRow.label != "")
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    grouped = query.group_by(VersionRow.set_id, ExampleRow.label).order_by(func.min(ExampleRow.position))
    for set_id, label, count in session.execute(grouped):
        counts[set_id][label] = count
    return counts


def _in_versions(versions: Sequence[VersionKey], *columns: Any) -> Select[Any]:
    """Select columns of the examples of these versions."""
    is_in_version = and_(*in_version(VersionRow.set_id, VersionRow.version))
    is_wanted = tuple_(VersionRow.set_id, VersionRow.version).in_(versions)
    return select(*columns).select_from(VersionRow).join(ExampleRow, is_in_version).where(is_wanted)
