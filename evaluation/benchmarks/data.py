"""Reads the data of a benchmark from a folder: queries with their media files, and examples for selecting shots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.items import DataError, DataMissing, Folder, Item, Row
from evaluation.benchmarks.readers import images, videos
from evaluation.benchmarks.readers.files import Files, Reader

READERS: Mapping[str, Reader] = {
    "hateful_memes": images.read_hateful_memes,
    "imagenet": images.read_imagenet,
    "ivqa": videos.read_ivqa,
    "karpathy": images.read_karpathy,
    "kinetics": videos.read_kinetics,
    "nextqa": videos.read_nextqa,
    "questions": images.read_questions,
    "rareact": videos.read_rareact,
    "star": videos.read_star,
    "vatex": videos.read_vatex,
    "video_qa": videos.read_video_qa,
    "visdial": images.read_visdial,
    "youcook2": videos.read_youcook2,
}


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of a split, and how many rows were left out because their media files are missing."""

    items: list[Item]
    num_missing: int


class BenchmarkData:
    def __init__(self, benchmark: Benchmark, folder: Path) -> None:
        self._benchmark, self._folder = benchmark, Folder(folder)

    def rows(self, split: str) -> Iterator[Row]:
        benchmark = self._benchmark
        if (patterns := benchmark.splits.get(split)) is None:
            raise ValueError(f"{benchmark.title} has the splits {', '.join(benchmark.splits)}, not {split!r}")
        yield from READERS[benchmark.reader](Files(self._folder, split, patterns, benchmark.media_name))

    @cached_property
    def _support_rows(self) -> list[Row]:
        return [row for row in self.rows(self._benchmark.support_split or "") if row.shown_answer]

    def queries(self, split: str, limit: int | None, seed: int) -> Queries:
        """Return the queries in the order of the file; with a limit, a random sample of those that have their media."""
        if not (rows := list(self.rows(split))):
            raise DataMissing(f"{self._folder.path} has no rows of {split}")
        ids = set[str]()
        for row in rows:
            if row.id in ids:
                raise DataError(f"{row.where}: the id {row.id!r} repeats")
            ids.add(row.id)
        items = [item for row in rows if (item := self._item(row, split)) is not None]
        num_missing = len(rows) - len(items)
        if limit is not None and limit < len(items):
            items = [items[i] for i in sorted(Random(f"{seed}/queries").sample(range(len(items)), limit))]
        if not items:
            raise DataMissing(f"{self._folder.path} has no media file of {len(rows)} rows of {split}")
        unanswered = [item for item in items if not item.row.answers]
        if 0 < len(unanswered) < len(items):
            raise DataError(f"{unanswered[0].row.where}: there is no answer, but other rows have one")
        return Queries(items, num_missing)

    def support(self, num_examples: int | None, seed: int, unusable: Container[str] = ()) -> list[Item]:
        """Return a random sample of the support split: `num_examples` in all, or a number per label.

        The next rows of the random order replace the `unusable` ones, which are named by their `where`.
        """
        benchmark = self._benchmark
        if (split := benchmark.support_split) is None:
            return []
        rows = list(self._support_rows)
        Random(f"{seed}/support").shuffle(rows)
        per_label = benchmark.support_per_label if num_examples is None else None
        groups: defaultdict[str, int] = defaultdict(int)
        items: list[Item] = []
        for row in (row for row in rows if row.where not in unusable):
            if per_label is None and len(items) == (num_examples or benchmark.support_examples):
                break
            if per_label is not None and groups[row.shown_answer] == per_label:
                continue
            if (item := self._item(row, split)) is not None:
                groups[row.shown_answer] += 1
                items.append(item)
        return items

    def _item(self, row: Row, split: str) -> Item | None:
        """Return the row with its media file; None if it is missing and such files are counted, else raises DataError."""
        if clip := self._folder.find_media(row.media.clips, split):
            return Item(row, clip)
        if path := self._folder.find_media(row.media.names, split):
            return Item(row, path, row.media.segment)
        if self._benchmark.missing_media == "count":
            return None
        raise DataMissing(f"{row.where}: the folder has no media file {row.media.names[0]}")


def state(benchmark: Benchmark, folder: Path) -> str:
    """Return what the folder has of a benchmark: the number of queries and of missing media, or what it wants."""
    try:
        data = BenchmarkData(benchmark, folder)
        queries = data.queries(benchmark.split, None, 0)
        data.support(1, 0)
    except (DataError, OSError) as error:
        return f"wants data: {error}"
    missing = f", {queries.num_missing} without their media file" if queries.num_missing else ""
    return f"{len(queries.items)} queries of {benchmark.split}{missing}"
