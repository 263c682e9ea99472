"""Webdataset shards: tar files in which neighbours of one name are one record. Read in an order that can be gone on with.

An epoch shuffles the shards, deals them to the streams, and shuffles each shard's records within windows; everything
follows from seed, epoch and place, so a position of three numbers is the whole state.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random


class ShardError(ValueError):
    """Shards that cannot be read from at all."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record's files by their extension, everything behind the first dot: "jpg", "0.png", "json"."""

    name: str
    files: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Position:
    epoch: int = 0
    shard: int = 0  # place in the epoch's order of this stream
    record: int = 0  # records of that shard already given


def read_shard(file: Path, skip: int = 0) -> Iterator[RawRecord]:
    """Records in the file's order; those skipped are not read, only passed."""
    number, key, files = -1, None, dict[str, bytes]()
    with tarfile.open(file) as archive:
        for member in archive:
            if not member.isfile():
                continue
            found, extension = _split(member.name)
            if found != key:
                if files:
                    yield RawRecord(f"{file.name}/{key}", files)
                number, key, files = number + 1, found, {}
            if number >= skip and (stream := archive.extractfile(member)) is not None:
                files[extension] = stream.read()
    if files:
        yield RawRecord(f"{file.name}/{key}", files)


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def stream_records(
    shards: Sequence[Path], *, seed: int, window: int, index: int, num_streams: int, start: Position
) -> Iterator[tuple[Position, RawRecord]]:
    """A stream's records without end, each with the position behind it."""
    if len(shards) < num_streams:
        raise ShardError(f"{len(shards)} shards cannot be dealt to {num_streams} streams: each needs one")
    epoch, first_shard, first_record = start.epoch, start.shard, start.record
    while True:
        order = _epoch_order(shards, seed, epoch)[index::num_streams]
        given = 0
        for place in range(first_shard, len(order)):
            label = f"{seed}/{epoch}/{order[place].name}"
            for number, record in enumerate(_shuffled(order[place], label, window, first_record), first_record):
                given += 1
                yield Position(epoch, place, number + 1), record
            first_record = 0
        if not given and first_shard == 0:
            raise ShardError(f"the shards of stream {index} hold no record: {', '.join(map(str, order))}")
        epoch, first_shard = epoch + 1, 0


def _epoch_order(shards: Sequence[Path], seed: int, epoch: int) -> list[Path]:
    order = sorted(shards)
    Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _shuffled(file: Path, label: str, window: int, skip: int) -> Iterator[RawRecord]:
    """Windows of records, each in an order of its own; `skip` counts records as given."""
    number, behind = divmod(skip, window)
    records = read_shard(file, number * window)
    while together := list(islice(records, window)):
        Random(f"{label}/{number}").shuffle(together)
        yield from together[behind:]
        number, behind = number + 1, 0
