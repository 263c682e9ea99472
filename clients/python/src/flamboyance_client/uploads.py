"""Uploads of labelled media to a support set, in requests of a limited size.

A new set gets its name when it is complete: until then it has none, and expires if the upload is interrupted. An existing
set is changed to have the examples of the source: new ones are added, those whose label or other text was changed are put
again, and those that an earlier upload wrote and that the source no longer has are removed. Nothing else is sent, and
examples that others put stay. New ones are added first, unless the set is full.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from flamboyance_client.api import Call, checked_options
from flamboyance_client.errors import ApiError, Conflict, FlamboyanceError, NotFound, Refusal
from flamboyance_client.fewshot import Example
from flamboyance_client.folders import UnreadableFiles, labelled_files, listed, readable_labelled_files
from flamboyance_client.frames import Columns, Frame, labelled_rows
from flamboyance_client.labelled import (
    LabelledMedia,
    Unreadable,
    is_content_id,
    is_of_file,
    with_ids,
    without_accents,
)
from flamboyance_client.notebook import MAX_PREVIEWS
from flamboyance_client.options import SetChanges, SetFields
from flamboyance_client.previews import spread
from flamboyance_client.progress import visible_bar
from flamboyance_client.records import Preview, SkippedFile, StoredExample, SupportSet
from flamboyance_client.steps import Steps
from flamboyance_client.stored import NAME_TAKEN, SupportSetCalls, read_examples

# Far below the default limit of a request's body, 64 MiB. Larger media are sent alone.
BATCH_BYTES = 8 * 2**20
BATCH_EXAMPLES = 64
# The ids are part of a URL, whose length is limited.
REMOVED_AT_ONCE = 100
# the code of the error for more examples than a set may have
NO_ROOM = "too_many_examples"
# the code of the error for media that cannot be decoded, or exceed a limit of media
UNREADABLE = "invalid_media"
# that for media which have too many pixels together, so that a part of them may be accepted
TOO_MANY_PIXELS = "too_many_pixels"
# with that for a larger request than the server reads, which only media that are sent alone exceed
REFUSED_MEDIA = (UNREADABLE, TOO_MANY_PIXELS, "body_too_large")
# The lifetime of a set that was made to try media.
TRIAL_SECONDS = 60.0
# The lifetime of a set whose upload was interrupted.
UNFINISHED_SECONDS = 24 * 3600.0


@dataclass(slots=True)
class Batch:
    """The examples of one request, and their names in messages."""

    names: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, name: str, example: Example, num_bytes: int) -> None:
        self.names.append(name)
        self.examples.append(example)
        self.num_bytes += num_bytes

    def is_full(self, num_bytes: int) -> bool:
        """Return whether an example of this size belongs into the next batch."""
        is_too_large = self.num_bytes + num_bytes > BATCH_BYTES
        return bool(self.examples) and (is_too_large or len(self.examples) == BATCH_EXAMPLES)

    def halves(self) -> tuple[Batch, Batch]:
        return self.split(len(self.examples) // 2)

    def split(self, number: int) -> tuple[Batch, Batch]:
        """Return a batch of the first `number` examples, and one of the others."""
        return Batch(self.names[:number], self.examples[:number]), Batch(self.names[number:], self.examples[number:])


def set_name(folder: str | Path, otherwise: str = "pass name=...") -> str:
    """Return a name for the set of a folder: the folder's, in the characters that names may have.

    Raises `ValueError`, which says what to do `otherwise`, for a folder whose name has none of these characters.
    """
    name = re.sub(r"[^A-Za-z0-9_.:-]+", "-", without_accents(Path(folder).resolve().name)).lstrip("_.:-")[:128]
    if not name or name.startswith("ss_"):
        raise ValueError(f"the name of the folder {folder} cannot be the name of a support set: {otherwise}")
    return name


def upload_folder(
    calls: SupportSetCalls,
    folder: str | Path,
    question: str | None,
    name: str | None,
    *,
    skip_unreadable: bool,
    exist_ok: bool,
    fields: SetFields,
) -> Steps[SupportSet]:
    """Upload the files of a folder to the set that has its name, or the name `name`."""
    files, unreadable = readable_labelled_files(folder) if skip_unreadable else (labelled_files(folder), [])
    items = with_ids([replace(file, question=question) for file in files])
    name = set_name(folder) if name is None else name
    if skip_unreadable:
        items, refused = yield from _tried(calls, items, name, exist_ok=exist_ok)
        unreadable = [*unreadable, *refused]
    if not items:
        raise UnreadableFiles(f"the server can read none of these: {listed(list(map(str, _skipped(unreadable))))}")
    files_kept = {item.file_in_id for item, _ in unreadable}
    uploaded = yield from upload(calls, items, name, exist_ok=exist_ok, fields=fields, files_kept=files_kept)
    return replace(uploaded, skipped=_skipped(unreadable))


def _skipped(unreadable: Sequence[Unreadable]) -> tuple[SkippedFile, ...]:
    return tuple(sorted(SkippedFile(item.name, reason) for item, reason in unreadable))


def _tried(
    calls: SupportSetCalls, items: Sequence[LabelledMedia], name: str, *, exist_ok: bool
) -> Steps[tuple[list[LabelledMedia], list[Unreadable]]]:
    """Return the items that the server accepts, and the others with its reason.

    Items that the set does not have yet are sent to sets that are deleted at once, so that a refusal changes nothing.
    """
    existing = yield from _find(calls, name, exist_ok=exist_ok)
    known = {} if existing is None else dict((yield from read_examples(calls, existing, _texts_by_id)))
    refused: list[Unreadable] = []
    new = [item for item in items if item.id not in known]
    for batch in _batches(new, f"{name}: checking"):
        yield from _try(calls, batch, new[: len(batch.examples)], refused)
        new = new[len(batch.examples) :]
    ids = {item.id for item, _ in refused}
    return [item for item in items if item.id not in ids], refused


def _try(
    calls: SupportSetCalls,
    batch: Batch,
    items: Sequence[LabelledMedia],
    refused: list[Unreadable],
) -> Steps[None]:
    """Send the items of a batch, and add those that the server does not accept to `refused`.

    A refused batch is sent in halves, because its media together may exceed a limit that none of them exceeds.
    """
    try:
        trial = yield calls.create({"examples": batch.examples, "ttl_seconds": TRIAL_SECONDS})
        yield calls.delete(trial.id)
    except ApiError as error:
        if error.code not in REFUSED_MEDIA:
            raise
        if len(items) == 1:
            refused.append((items[0], error.message.removeprefix(f"{error.param}: ")))
            return
        middle = len(items) // 2
        for half, half_items in zip(batch.halves(), (items[:middle], items[middle:]), strict=True):
            yield from _try(calls, half, half_items, refused)


def upload_frame(
    calls: SupportSetCalls,
    frame: Frame,
    columns: Columns,
    root: str | Path,
    name: str | None,
    *,
    exist_ok: bool,
    fields: SetFields,
) -> Steps[SupportSet]:
    """Upload the rows of a data frame."""
    items = with_ids(labelled_rows(frame, columns, root))
    return (yield from upload(calls, items, name, exist_ok=exist_ok, fields=fields))


def upload(
    calls: SupportSetCalls,
    items: Sequence[LabelledMedia],
    name: str | None,
    *,
    exist_ok: bool,
    fields: SetFields,
    files_kept: Collection[str] = (),
) -> Steps[SupportSet]:
    """Return the set with these items, which have ids, as its examples: a new one, or the one that has the name.

    `files_kept` names files as ids do: their examples stay in the set, although they are not among the items. Raises
    `Conflict` for a name that is taken unless `exist_ok`, for a name whose set has none of these examples, since it may
    belong to another client, and for a set that another client changes meanwhile.
    """
    options: Any = checked_options(SetFields, fields)
    target = yield from _upload(calls, items, name, options, files_kept, exist_ok=exist_ok)
    first = spread(items, lambda item: item.label or "", MAX_PREVIEWS)
    previews = tuple(Preview(label=item.label or item.answer or "", media=item.media) for item in first)
    return replace(target, previews=previews)


def _upload(
    calls: SupportSetCalls,
    items: Sequence[LabelledMedia],
    name: str | None,
    options: SetChanges,
    files_kept: Collection[str],
    *,
    exist_ok: bool,
) -> Steps[SupportSet]:
    existing = None if name is None else (yield from _find(calls, name, exist_ok=exist_ok))
    if existing is None:
        try:
            return (yield from _create(calls, items, name, options))
        except Conflict as conflict:
            if not exist_ok or conflict.code != NAME_TAKEN or name is None:
                raise
            # another client has made the set meanwhile
            existing = yield calls.get(name, None)
    return (yield from _change(calls, existing, items, options, files_kept))


def _find(calls: SupportSetCalls, name: str, *, exist_ok: bool) -> Steps[SupportSet | None]:
    """Return the set that has the name, or None. Raises `Conflict` if there is one, unless `exist_ok`."""
    try:
        existing = yield calls.get(name, None)
    except NotFound:
        return None
    if not exist_ok:
        raise _name_taken(f"the name {name!r} is taken by the support set {existing.id}")
    return existing


def _create(
    calls: SupportSetCalls, items: Sequence[LabelledMedia], name: str | None, options: SetChanges
) -> Steps[SupportSet]:
    batches = _batches(items, name)
    target, rest = yield from _store_part(lambda batch: _unfinished(calls, batch), next(batches))
    try:
        target = yield from _add_all(calls, target, chain(rest, batches))
        changes: SetChanges = {"ttl_seconds": None, **options}
        return (yield calls.update(target.id, changes if name is None else {**changes, "name": name}))
    except Exception:
        with suppress(FlamboyanceError):
            yield calls.delete(target.id)
        raise


def _change(
    calls: SupportSetCalls,
    target: SupportSet,
    items: Sequence[LabelledMedia],
    options: SetChanges,
    files_kept: Collection[str],
) -> Steps[SupportSet]:
    stored = dict((yield from read_examples(calls, target, _texts_by_id)))
    current = {item.id for item in items}
    if stored and not current & stored.keys():
        raise _name_taken(
            f"the support set {target.name!r} has {len(stored)} examples, and none of them is among these "
            "(another label or question makes another example)"
        )
    new = [item for item in items if item.id not in stored]
    changed = [item for item in items if item.id in stored and stored[item.id] != item.texts]
    gone = [id for id in stored if id not in current and is_content_id(id) and not is_of_file(id, files_kept)]
    target = yield from _add_all(calls, target, _batches(changed, target.name))
    target = yield from _exchange(calls, target, _batches(new, target.name), len(new), gone)
    target = (yield calls.update(target.id, options)) if options else target
    return replace(target, num_removed=len(gone))


def _name_taken(message: str) -> Conflict:
    return Conflict(Refusal(message=message, param="name", code=NAME_TAKEN, status=409))


def _texts_by_id(stored: StoredExample) -> tuple[str, tuple[str, str, str]]:
    return stored.id, (stored.label, stored.text, stored.question)


def _add_all(calls: SupportSetCalls, target: SupportSet, batches: Iterable[Batch]) -> Steps[SupportSet]:
    """Add batches to a set, each in several requests if one may not have so many pixels."""
    waiting = iter(batches)
    while (batch := next(waiting, None)) is not None:
        target, rest = yield from _add_part(calls, target, batch)
        waiting = chain(rest, waiting) if rest else waiting  # a chain for each batch would become slow
    return target


def _exchange(
    calls: SupportSetCalls, target: SupportSet, batches: Iterator[Batch], num_new: int, gone: Sequence[str]
) -> Steps[SupportSet]:
    """Add the batches, which have `num_new` examples, and then remove the examples that are gone.

    A set that has no room for a batch loses as many of those examples first, for this batch and for each later one. It
    loses none if it has no room for the new examples even without them.
    """
    is_full = False
    while (batch := next(batches, None)) is not None:
        if not is_full:
            try:
                target, rest = yield from _add_part(calls, target, batch)
            except ApiError as error:
                # the number by which the set grows: if there is no room for as many of the batch, there never will be
                num_more = max(num_new - len(gone), 0)
                if error.code != NO_ROOM or not gone or num_more >= len(batch.examples):
                    raise
            else:
                num_new -= len(batch.examples) - sum(len(part.examples) for part in rest)
                batches = chain(rest, batches) if rest else batches
                continue
            is_full = True
            if num_more:
                first, batch = batch.split(num_more)
                target = yield from _add_all(calls, target, [first])
        target = yield from _remove(calls, target, gone[: len(batch.examples)])
        gone = gone[len(batch.examples) :]
        target = yield from _add_all(calls, target, [batch])
    return (yield from _remove(calls, target, gone))


def _remove(calls: SupportSetCalls, target: SupportSet, ids: Sequence[str]) -> Steps[SupportSet]:
    for start in range(0, len(ids), REMOVED_AT_ONCE):
        target = yield calls.remove(target.id, ids[start : start + REMOVED_AT_ONCE], target.version)
    return target


def _add_part(calls: SupportSetCalls, target: SupportSet, batch: Batch) -> Steps[tuple[SupportSet, list[Batch]]]:
    """Add as much of a batch to a set as a request may have; return the set with the rest of the batch."""
    return (yield from _store_part(lambda part: calls.put(target.id, part.examples, target.version), batch))


def _unfinished(calls: SupportSetCalls, batch: Batch) -> Call[SupportSet]:
    return calls.create({"examples": batch.examples, "ttl_seconds": UNFINISHED_SECONDS})


def _store_part(store: Callable[[Batch], Call[SupportSet]], batch: Batch) -> Steps[tuple[SupportSet, list[Batch]]]:
    """Store as much of a batch as a request may have; return the set with the rest of the batch.

    An error leaves nothing of the batch stored.
    """
    try:
        return (yield store(batch)), []
    except ApiError as error:
        first, second = _halves(batch, error)
    target, rest = yield from _store_part(store, first)
    return target, [*rest, second]


def _halves(batch: Batch, error: ApiError) -> tuple[Batch, Batch]:
    """Return the halves of a batch that has too many pixels.

    Raises any other error, which names the media too if it has the index of an example.
    """
    if error.code == TOO_MANY_PIXELS and len(batch.examples) > 1:
        return batch.halves()
    if (match := re.match(r"examples\[(\d+)\]", error.param or "")) is None:
        raise error
    raise error.about(batch.names[int(match[1])]) from None


def _batches(items: Sequence[LabelledMedia], name: str | None) -> Iterator[Batch]:
    """Yield the items in batches of a limited size, and show the progress in a notebook or on a terminal."""
    batch = Batch()
    with visible_bar(len(items), name or "support set", "example", is_hidden=not items) as bar:
        for item in items:
            example = item.example()
            num_bytes = len(json.dumps(example))
            if batch.is_full(num_bytes):
                yield batch
                bar.update(len(batch.examples))
                batch = Batch()
            batch.add(item.name, example, num_bytes)
        if batch.examples:
            yield batch
            bar.update(len(batch.examples))
