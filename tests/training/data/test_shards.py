"""Shards: records whole, an order that follows from the seed, resumed anywhere, dealt out without loss or doubling."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from training.data.make import write_shards
from training.data.shards import Position, RawRecord, ShardError, read_shard, stream_records

COUNT = 23


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    records = [RawRecord(str(n), {"txt": str(n).encode(), "0.png": b"x", "json": b"{}"}) for n in range(COUNT)]
    write_shards(records, tmp_path, 5)
    return sorted(tmp_path.glob("*.tar"))


def numbers(shards: list[Path], count: int, *, start: Position | None = None, index: int = 0, of: int = 1) -> list[int]:
    stream = stream_records(
        shards, seed=7, window=3, index=index, num_streams=of, start=Position() if start is None else start
    )
    return [int(record.files["txt"]) for _, record in islice(stream, count)]


def test_files_of_one_name_are_one_record(shards: list[Path]) -> None:
    first = next(read_shard(shards[0]))
    assert first == RawRecord("000000.tar/000000000", {"txt": b"0", "0.png": b"x", "json": b"{}"})
    assert len(list(read_shard(shards[-1]))) == COUNT % 5
    assert [record.files.get("txt") for record in read_shard(shards[0], skip=3)] == [b"3", b"4"]


def test_an_epoch_gives_every_record_once_and_the_next_in_another_order(shards: list[Path]) -> None:
    two = numbers(shards, 2 * COUNT)
    assert sorted(two[:COUNT]) == sorted(two[COUNT:]) == list(range(COUNT))
    assert two[:COUNT] != two[COUNT:] != list(range(COUNT))
    assert numbers(shards, COUNT) == two[:COUNT]


@pytest.mark.parametrize("taken", range(1, 2 * COUNT, 4))
def test_any_position_goes_on_as_if_nothing_had_happened(shards: list[Path], taken: int) -> None:
    stream = stream_records(shards, seed=7, window=3, index=0, num_streams=1, start=Position())
    position = next(islice(stream, taken - 1, None))[0]
    assert numbers(shards, 10, start=position) == numbers(shards, taken + 10)[taken:]


def test_streams_share_an_epoch_out(shards: list[Path]) -> None:
    given: list[int] = []
    for index in (0, 1):
        stream = stream_records(shards, seed=7, window=3, index=index, num_streams=2, start=Position())
        for position, record in stream:
            if position.epoch:
                break
            given.append(int(record.files["txt"]))
    assert sorted(given) == list(range(COUNT))


def test_more_streams_than_shards_are_refused(shards: list[Path]) -> None:
    with pytest.raises(ShardError, match="5 shards cannot be dealt to 6 streams"):
        numbers(shards, 1, of=6)


def test_shards_without_a_record_are_an_error_and_not_an_endless_search(tmp_path: Path) -> None:
    write_shards([RawRecord("0", {})], tmp_path, 1)
    with pytest.raises(ShardError, match="hold no record"):
        numbers(list(tmp_path.glob("*.tar")), 1)
