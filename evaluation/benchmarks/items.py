"""Queries and worked examples of a benchmark, and the rows and media files that they are read from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}
VIDEOS = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".flv", ".m4v", ".3gp"}


class DataError(ValueError):
    """Data that cannot be read; the message names the file and the row."""


class DataMissing(DataError):
    """A file of the data that is not in the folder."""


@dataclass(frozen=True, slots=True)
class MediaNames:
    """The possible names of a media file, with or without a suffix.

    If a row is about a segment of a video, in seconds, `clips` has the possible names of a file of the segment alone.
    """

    names: Sequence[str]
    segment: tuple[float, float] | None = None
    clips: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of an official file. `where` names it in messages, `answers` are the reference answers.

    `facts` is what only the metric reads.
    """

    id: str
    where: str
    media: MediaNames
    question: str = ""
    text: str = ""
    answers: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown_answer(self) -> str:
        """The answer that a shot shows: the first one with words, "" if there is none."""
        return next((answer for answer in self.answers if answer.strip()), "")

    def check_texts(self) -> None:
        """Raise DataError for half of a surrogate pair, which JSON can have and a request cannot."""
        try:
            "".join((self.question, self.text, self.shown_answer, *self.candidates)).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not Unicode: {error}") from None


@dataclass(frozen=True, slots=True)
class Item:
    """A row with its media file, or with the segment of a video that it is about."""

    row: Row
    media: Path
    segment: tuple[float, float] | None = None

    def digest(self) -> bytes:
        """Return a digest of the row and of the name and size of its media file."""
        row, media = self.row, (self.media.name, self.media.stat().st_size, self.segment)
        texts = (row.id, row.question, row.text, row.answers, dict(row.facts), _digest_texts(row.candidates))
        return hashlib.blake2b(json.dumps([*texts, media]).encode(), digest_size=16).digest()


@lru_cache  # many rows have the same thousand candidates
def _digest_texts(texts: tuple[str, ...]) -> str:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def digest(items: Sequence[Item]) -> str:
    return hashlib.blake2b(b"".join(item.digest() for item in items), digest_size=8).hexdigest()


class Folder:
    """The folder of a benchmark's data, with its media files by their names without suffix."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataMissing(f"{path} is not a folder")
        self.path = path
        self._files = sorted(_files(path, frozenset()))
        self._media: dict[str, list[Path]] = {}
        for file in self._files:
            if file.suffix.lower() in IMAGES | VIDEOS:
                self._media.setdefault(_stem(file.name), []).append(file)

    def find(self, patterns: Sequence[str]) -> Path | None:
        """Return the first file, or folder of media, whose path ends like one of the patterns.

        Raises DataError for several files.
        """
        for pattern in patterns:
            matches = [file for file in self._files if file.match(pattern)]
            if len(matches) > 1:
                raise DataError(f"{self.path} has several files {pattern}: {', '.join(map(str, matches[:3]))}")
            if matches:
                return matches[0]
        media = (file for files in self._media.values() for file in files)
        folders = {folder for file in media for folder in (file.parent, file.parent.parent)}
        return min((folder for folder in folders if any(map(folder.match, patterns))), key=_depth, default=None)

    def require(self, patterns: Sequence[str]) -> Path:
        if (path := self.find(patterns)) is None:
            raise DataMissing(f"{self.path} has no file {' or '.join(patterns)}")
        return path

    def find_media(self, names: Sequence[str], split: str) -> Path | None:
        """Return the media file of the first name that exists, with any suffix.

        Of several files of a name, the path that ends like the name is taken, then the one in a folder of the split.
        """
        for name in names:
            files = self._media.get(_stem(name), [])
            exact = [file for file in files if file.match(f"*{name}")] or [f for f in files if f.match(f"{name}.*")]
            narrowed = exact or files
            in_split = [f for f in narrowed if any(split in part for part in f.relative_to(self.path).parts[:-1])]
            if narrowed := in_split or narrowed:
                return narrowed[0]
        return None


def _files(folder: Path, parents: frozenset[Path]) -> Iterator[Path]:
    """Yield the files of a folder and of those in it, also by symbolic links, without the metadata files of macOS.

    A link to one of the `parents` is not followed.
    """
    if (resolved := folder.resolve()) in parents:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, parents | {resolved})
        elif path.is_file() and not path.name.startswith("._"):
            yield path


def _depth(path: Path) -> tuple[int, Path]:
    return len(path.parts), path


def _stem(name: str) -> str:
    """Return a name without the suffixes of media, of which downloaders write several: `ID.mp4.webm`."""
    file = Path(name)
    return _stem(file.stem) if file.suffix.lower() in IMAGES | VIDEOS else file.name


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a file as it is, whose fields are read by name and type."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """Return a field; raises DataError if it is missing or has another type."""
        value = self.values.get(name)
        if value is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            state = "is missing" if value is None else f"is {value!r:.60}"
            raise DataError(f"{self.where}: the field {name!r} {state}")
        return value

    def text(self, name: str) -> str:
        """Return a field that is a text, or a number, without surrounding spaces; raises DataError if it is empty."""
        if not (text := str(self.get(name, (str, int))).strip()):
            raise DataError(f"{self.where}: the field {name!r} is empty")
        return text

    def number(self, name: str) -> float:
        try:
            return float(self.get(name, (str, int, float)))
        except ValueError:
            raise DataError(f"{self.where}: the field {name!r} is {self.values[name]!r}, not a number") from None

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a list of texts, or numbers, as they are."""
        return tuple(str(Record({name: value}, self.where).get(name, (str, int))) for value in self.get(name, list))

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a field that is a list of numbers."""
        return tuple(Record({name: value}, self.where).get(name, (int, float)) for value in self.get(name, list))

    def has(self, *names: str) -> bool:
        return all(self.values.get(name) not in (None, "") for name in names)


def read_json(path: Path) -> Any:
    return _parse_json(read_text(path), str(path))


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    if not isinstance(values := read_json(path), dict):
        raise DataError(f"{path}: an object is expected, not {values!r:.60}")
    return values


def records(values: Any, source: Path | str, part: str = "") -> Iterator[Record]:
    """Yield the objects of a list in a file, or in a row that is given by its `where`, numbered from 1.

    Raises DataError for what is no list of objects.
    """
    where = f"{source}{f', {part}' if part else ''}"
    if not isinstance(values, list):
        raise DataError(f"{where}: a list is expected")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise DataError(f"{where}, row {number}: an object is expected, not {value!r:.60}")
        yield Record(value, f"{where}, row {number}")


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the objects of a file with one JSON object per line."""
    # not by str.splitlines, which divides texts at U+2028 and others, too
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            values = _parse_json(line, f"{path}, row {number}")
            if not isinstance(values, dict):
                raise DataError(f"{path}, row {number}: an object is expected, not {values!r:.60}")
            yield Record(values, f"{path}, row {number}")


def read_table(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a CSV file, numbered from 1 after the header; raises DataError if a column is missing."""
    table = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if missing := [name for name in columns if name not in (table.fieldnames or ())]:
        raise DataError(f"{path}: the column {missing[0]!r} is missing; the columns are {table.fieldnames}")
    number = 0
    try:
        for number, values in enumerate(table, 1):
            if None in values:
                raise DataError(f"{path}, row {number}: more fields than columns")
            yield Record(values, f"{path}, row {number}")
    except csv.Error as error:  # for example a quote without an end
        raise DataError(f"{path}, row {number + 1}: {error}") from None


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8; raises DataError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}") from None
