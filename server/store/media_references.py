"""Which media of the store support sets refer to, so that none goes that is referred to and none stays that is not.

A request leases its media, stores their bytes, and refers to them in the transaction that gives the leases back. Bytes
are deleted under the lock of their row, and only without reference or lease: whoever leases later stores them again.
What a client uploaded by itself has a row that says so, and is not swept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import delete, exists, func, insert, select, update
from sqlalchemy.orm import Session

from server.errors import MediaInUse
from server.media.store import MediaStore
from server.store.tables import EmbeddingRow, ExampleMediaRow, LeaseRow, MediaRow

# far longer than storing the media of one request takes
LEASE_SECONDS = 900.0
# deleted in one transaction: others who write wait for it
MEDIA_PER_SWEEP = 16
# parameters of one statement: SQLite takes 32766
MAX_PARAMETERS = 1000


class LeaseLost(Exception):
    """The media were stored so slowly that they may be gone again: lease and store them once more."""


def lease(session: Session, sizes: Mapping[str, int], uploaded: set[str], holder: str, now: float) -> None:
    """`sizes`: bytes by media id; `uploaded`: those of them that a client has stored by itself."""
    known = _known(session, sizes)
    new = [
        {"media_id": media_id, "num_bytes": size, "is_uploaded": media_id in uploaded}
        for media_id, size in sorted(sizes.items())
        if media_id not in known
    ]
    if new:
        session.execute(insert(MediaRow), new)
    if sizes:
        leases = [{"holder": holder, "media_id": m, "expires_at": now + LEASE_SECONDS} for m in sorted(sizes)]
        session.execute(insert(LeaseRow), leases)


def give_back(session: Session, holder: str, num_media: int, now: float) -> None:
    """Raises `LeaseLost` when any of the leases has expired."""
    where = (LeaseRow.holder == holder, LeaseRow.expires_at > now)
    if session.execute(delete(LeaseRow).where(*where)).rowcount != num_media:  # type: ignore[attr-defined]
        raise LeaseLost


def is_used(session: Session, media_id: str, now: float) -> bool:
    """Whether an example of any version refers to it, or a request under way is about to."""
    leased = exists().where(LeaseRow.media_id == media_id, LeaseRow.expires_at > now)
    referred = exists().where(ExampleMediaRow.media_id == media_id)
    return bool(session.scalar(select(referred | leased)))


def mark_uploaded(session: Session, media_id: str, num_bytes: int) -> None:
    """Makes the row where there is none: a request about to lease the media then finds it."""
    marked = session.execute(update(MediaRow).where(MediaRow.media_id == media_id).values(is_uploaded=True))
    if not marked.rowcount:  # type: ignore[attr-defined]
        session.execute(insert(MediaRow).values(media_id=media_id, num_bytes=num_bytes, is_uploaded=True))


def delete_media(session: Session, store: MediaStore, media_id: str, now: float) -> None:
    """Raises `MediaInUse` or `MediaNotFound`."""
    row = session.scalar(select(MediaRow).where(MediaRow.media_id == media_id).with_for_update())
    if is_used(session, media_id, now):
        raise MediaInUse(f"the media {media_id[:80]!r} is used by a support set")
    if row is not None:
        _delete_rows(session, [media_id], now)
    store.delete(media_id)


def sweep(session: Session, store: MediaStore, now: float) -> int:
    """Delete some media, rows and bytes, that came with support sets which are gone. Returns how many."""
    unused = (
        select(MediaRow.media_id)
        .where(
            ~MediaRow.is_uploaded,
            ~exists().where(ExampleMediaRow.media_id == MediaRow.media_id),
            ~exists().where(LeaseRow.media_id == MediaRow.media_id, LeaseRow.expires_at > now),
        )
        .order_by(MediaRow.media_id)
        .limit(MEDIA_PER_SWEEP)
        .with_for_update(skip_locked=True)
    )
    found = list(session.scalars(unused))
    _delete_rows(session, found, now)
    for media_id in found:
        if store.exists(media_id):
            store.delete(media_id)
    return len(found)


def num_bytes(session: Session) -> int:
    """Of all media that support sets refer to."""
    referred = exists().where(ExampleMediaRow.media_id == MediaRow.media_id)
    return session.scalar(select(func.coalesce(func.sum(MediaRow.num_bytes), 0)).where(referred)) or 0


def _known(session: Session, media_ids: Iterable[str]) -> set[str]:
    """Of these, the ones that have a row, which is locked against being swept."""
    ids, found = sorted(media_ids), set[str]()
    for start in range(0, len(ids), MAX_PARAMETERS):
        some = ids[start : start + MAX_PARAMETERS]
        query = select(MediaRow.media_id).where(MediaRow.media_id.in_(some)).order_by(MediaRow.media_id)
        found.update(session.scalars(query.with_for_update(read=True, key_share=True)))
    return found


def _delete_rows(session: Session, media_ids: list[str], now: float) -> None:
    """Fails, as it must, where a row has been leased or referred to since it was found unused."""
    expired = (LeaseRow.media_id.in_(media_ids), LeaseRow.expires_at <= now)
    session.execute(delete(LeaseRow).where(*expired))
    session.execute(delete(EmbeddingRow).where(EmbeddingRow.key.in_(media_ids)))
    session.execute(delete(MediaRow).where(MediaRow.media_id.in_(media_ids)))
