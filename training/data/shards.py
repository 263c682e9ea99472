"""Reads WebDataset shards, tar files in which adjacent files of one name form a record, in a resumable order.

An epoch shuffles the shards, distributes them over the streams, and shuffles each shard's records within windows. The
order is determined by seed, epoch and index, so a position of three numbers is the whole state.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

# the errors of tarfile, and of the decoders of compressed files
DAMAGES = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error)


class ShardError(ValueError):
    """A set's shards cannot be read."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record's files by their extension, which is everything after the first dot: "jpg", "0.png", "json"."""

    name: str
    files: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Position:
    epoch: int = 0
    shard: int = 0  # index in this stream's order of the epoch
    record: int = 0  # the number of records of that shard already yielded


def read_shard(file: Path, skip: int = 0) -> Iterator[RawRecord]:
    """Yield the records in the file's order; the contents of the first `skip` records are not read.

    Raises ShardError for a file that is no tar file, or is damaged.
    """
    try:
        with tarfile.open(file) as archive:
            yield from _records(archive, file.name, skip)
            _check_end(archive)
    except DAMAGES as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # the others are those of each kind of compression
        raise ShardError(f"shard {file} is damaged or ends early: {reason}") from None


def _records(archive: tarfile.TarFile, shard: str, skip: int) -> Iterator[RawRecord]:
    number, key, files, first_extension = -1, None, dict[str, bytes](), ""
    for member in archive:
        if not member.isfile():
            continue
        member_key, extension = split_name(member.name)
        if member_key.endswith("/") or not member_key:
            continue  # it begins with a dot, as the files that macOS adds for each other file do
        if member_key != key or extension == first_extension:  # two records in a row may have the same name
            if files:
                yield RawRecord(f"{shard}/{key}", files)
            number, key, files, first_extension = number + 1, member_key, {}, extension
        if number >= skip and (stream := archive.extractfile(member)) is not None:
            files[extension] = stream.read()
    if files:
        yield RawRecord(f"{shard}/{key}", files)


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless a block of zeros follows the last file, and only zeros follow this block.

    tarfile takes a file that is cut between two members for a whole one, and a header that it cannot read for the end.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header and no end of the archive at byte {archive.offset}")
    while rest := archive.fileobj.read(tarfile.RECORDSIZE):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"a second archive follows the one that ends at byte {archive.offset}")


def split_name(name: str) -> tuple[str, str]:
    """Return the key of a file's record, and the rest of its name, in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def stream_records(
    shards: Sequence[Path], *, seed: int, window: int, index: int, num_streams: int, start: Position
) -> Iterator[tuple[Position, RawRecord]]:
    """Yield a stream's records endlessly, each with the position after it.

    Raises ShardError if there are fewer shards than streams, if the stream's shards hold no record, or if one is damaged.
    """
    if len(shards) < num_streams:
        raise ShardError(f"{len(shards)} shards cannot be distributed over {num_streams} streams: each needs one")
    while True:
        order = _epoch_order(shards, seed, start.epoch)[index::num_streams]
        # a resumed epoch may have no record left
        is_empty = start == Position(start.epoch)
        for shard in range(start.shard, len(order)):
            label = f"{seed}/{start.epoch}/{order[shard].name}"
            skip = start.record if shard == start.shard else 0
            for number, record in enumerate(_shuffle(order[shard], label, window, skip), skip):
                is_empty = False
                yield Position(start.epoch, shard, number + 1), record
        if is_empty:
            raise ShardError(f"the shards of stream {index} hold no record: {', '.join(map(str, order))}")
        start = Position(start.epoch + 1)


def seeded(label: str) -> Random:
    """Return a generator for a label, which may have bytes of a file's name that are not UTF-8."""
    return Random(label.encode("utf-8", "surrogateescape"))


def _epoch_order(shards: Sequence[Path], seed: int, epoch: int) -> list[Path]:
    order = sorted(shards)
    Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _shuffle(file: Path, label: str, window: int, skip: int) -> Iterator[RawRecord]:
    """Yield the shard's records, shuffled within windows, without the first `skip` records of that order."""
    number, num_skipped = divmod(skip, window)
    records = read_shard(file, number * window)
    while batch := list(islice(records, window)):
        seeded(f"{label}/{number}").shuffle(batch)
        yield from batch[num_skipped:]
        number, num_skipped = number + 1, 0
