"""The files of one split of a benchmark, by their role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks.items import Folder, Row


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a split. `media_name` is the pattern for the names of media that have a number."""

    folder: Folder
    split: str
    patterns: Mapping[str, Sequence[str]]
    media_name: str = "{}"

    def require(self, role: str) -> Path:
        """Return a file; raises DataMissing, with its name, if it is not there."""
        return self.folder.require(self.patterns[role])

    def find(self, role: str) -> Path | None:
        return self.folder.find(self.patterns[role]) if role in self.patterns else None

    @property
    def subset(self) -> list[str]:
        """The values by which a file marks the rows of the split."""
        return self.patterns["subset"][0].split()


Reader = Callable[[Files], Iterator[Row]]
