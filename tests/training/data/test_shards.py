"""Tests of shards: complete records, an order determined by the seed, resuming, and distribution over streams."""

from __future__ import annotations

import io
import os
import tarfile
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from training.data.make import write_shards
from training.data.shards import Position, RawRecord, ShardError, read_shard, seeded, stream_records

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


def test_files_with_the_same_name_form_one_record(shards: list[Path]) -> None:
    first = next(read_shard(shards[0]))
    assert first == RawRecord("000000.tar/000000000", {"txt": b"0", "0.png": b"x", "json": b"{}"})
    assert len(list(read_shard(shards[-1]))) == COUNT % 5
    assert [record.files.get("txt") for record in read_shard(shards[0], skip=3)] == [b"3", b"4"]


def write_tar(file: bytes, names: list[str]) -> None:
    with tarfile.open(os.fsdecode(file), "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))


def test_files_that_begin_with_a_dot_belong_to_no_record(tmp_path: Path) -> None:
    write_tar(bytes(tmp_path / "a.tar"), ["._0.png", "0.png", "._0.txt", "0.txt", "x/.1.png", "x/1.png", ".x/2.png"])
    assert [(record.name, list(record.files)) for record in read_shard(tmp_path / "a.tar")] == [
        ("a.tar/0", ["png", "txt"]),
        ("a.tar/x/1", ["png"]),
        ("a.tar/.x/2", ["png"]),
    ]


def test_two_records_in_a_row_may_have_one_name(tmp_path: Path) -> None:
    write_tar(bytes(tmp_path / "a.tar"), ["0.png", "0.txt", "0.png", "0.txt", "0.json", "1.png"])
    records = list(read_shard(tmp_path / "a.tar"))
    assert [list(record.files) for record in records] == [["png", "txt"], ["png", "txt", "json"], ["png"]]
    assert list(read_shard(tmp_path / "a.tar", skip=1)) == records[1:]


def test_a_repeated_file_of_a_record_replaces_the_first_one(tmp_path: Path) -> None:
    """`tar -r` adds a corrected file in this way."""
    write_tar(bytes(tmp_path / "a.tar"), ["0.png", "0.txt", "1.png", "1.txt", "1.txt"])
    records = list(read_shard(tmp_path / "a.tar"))
    assert [(record.name, list(record.files)) for record in records] == [
        ("a.tar/0", ["png", "txt"]),
        ("a.tar/1", ["png", "txt"]),
    ]


def test_an_empty_shard_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(ShardError, match=r"^shard .*a\.tar is damaged or ends early: [^\n]+[^\n:]$"):
        list(read_shard(tmp_path / "a.tar"))


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    file = bytes(tmp_path) + b"/caf\xe9.tar"
    write_tar(file, ["0.png", "caf\xe9.png"])
    shards = [Path(os.fsdecode(file))]
    stream = stream_records(shards, seed=7, window=3, index=0, num_streams=1, start=Position())
    names = {record.name for _, record in islice(stream, 2)}
    assert names == {"caf\udce9.tar/0", "caf\udce9.tar/caf\udce9"}
    assert len({seeded(name).random() for name in names}) == 2


def test_a_label_gives_the_numbers_that_python_gives_it() -> None:
    assert all(seeded(label).random() == Random(label).random() for label in ("", "7/0/000000.tar/0", "ä/日本"))


def test_an_epoch_yields_every_record_once_in_an_order_of_its_own(shards: list[Path]) -> None:
    two_epochs = numbers(shards, 2 * COUNT)
    assert sorted(two_epochs[:COUNT]) == sorted(two_epochs[COUNT:]) == list(range(COUNT))
    assert two_epochs[:COUNT] != two_epochs[COUNT:] != list(range(COUNT))
    assert numbers(shards, COUNT) == two_epochs[:COUNT]


@pytest.mark.parametrize("num_taken", range(1, 2 * COUNT, 4))
def test_a_stream_resumes_from_any_position(shards: list[Path], num_taken: int) -> None:
    stream = stream_records(shards, seed=7, window=3, index=0, num_streams=1, start=Position())
    position = next(islice(stream, num_taken - 1, None))[0]
    assert numbers(shards, 10, start=position) == numbers(shards, num_taken + 10)[num_taken:]


@pytest.mark.parametrize("per_shard", [COUNT, 5])
def test_a_stream_resumes_at_the_end_of_an_epoch(tmp_path: Path, per_shard: int) -> None:
    write_shards([RawRecord(str(n), {"txt": str(n).encode()}) for n in range(COUNT)], tmp_path, per_shard)
    shards = sorted(tmp_path.glob("*.tar"))
    stream = stream_records(shards, seed=7, window=3, index=0, num_streams=1, start=Position())
    position = next(islice(stream, COUNT - 1, None))[0]
    assert position.epoch == 0
    assert numbers(shards, COUNT, start=position) == numbers(shards, 2 * COUNT)[COUNT:]


def test_streams_divide_an_epoch(shards: list[Path]) -> None:
    yielded: list[int] = []
    for index in (0, 1):
        stream = stream_records(shards, seed=7, window=3, index=index, num_streams=2, start=Position())
        for position, record in stream:
            if position.epoch:
                break
            yielded.append(int(record.files["txt"]))
    assert sorted(yielded) == list(range(COUNT))


def test_more_streams_than_shards_are_refused(shards: list[Path]) -> None:
    with pytest.raises(ShardError, match="5 shards cannot be distributed over 6 streams"):
        numbers(shards, 1, of=6)


def test_shards_without_records_raise_an_error(tmp_path: Path) -> None:
    write_shards([RawRecord("0", {})], tmp_path, 1)
    with pytest.raises(ShardError, match="hold no record"):
        numbers(list(tmp_path.glob("*.tar")), 1)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("num_bytes", [0, 300, 812, 1836, 2348])
def test_a_truncated_shard_is_named(tmp_path: Path, num_bytes: int, mode: Literal["w", "w:gz"]) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name in "abc":
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = 800
            archive.addfile(member, io.BytesIO(Random(name).randbytes(800)))
    shard = tmp_path / "000001.tar"
    shard.write_bytes(content.getvalue()[:num_bytes])
    with pytest.raises(ShardError, match=r"shard .*000001\.tar is damaged or ends early"):
        list(read_shard(shard))


def test_a_shard_with_a_damaged_header_is_named(shards: list[Path]) -> None:
    content = bytearray(shards[0].read_bytes())
    content[4 * tarfile.BLOCKSIZE] ^= 1
    shards[0].write_bytes(content)
    with pytest.raises(ShardError, match=r"000000\.tar is damaged or ends early: no header and no end .* at byte 2048"):
        list(read_shard(shards[0]))


@pytest.mark.parametrize("num_blocks", [2, 4, 6])
def test_a_shard_that_is_cut_between_two_files_is_named(shards: list[Path], num_blocks: int) -> None:
    """Each file has a header and one block."""
    shards[0].write_bytes(shards[0].read_bytes()[: num_blocks * tarfile.BLOCKSIZE])
    with pytest.raises(ShardError, match=r"000000\.tar is damaged or ends early: no header and no end of the archive"):
        list(read_shard(shards[0]))


def test_two_archives_in_one_shard_are_refused(shards: list[Path]) -> None:
    shards[0].write_bytes(shards[0].read_bytes() + shards[1].read_bytes())
    with pytest.raises(ShardError, match=r"000000\.tar .*: a second archive follows the one that ends at byte"):
        list(read_shard(shards[0]))
