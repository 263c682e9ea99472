"""`python -m training.data.make SOURCE --out DIR`: shards from a folder of files with texts, or from a JSONL.

a folder   every image or video with a .txt of the same name beside it
a JSONL    {"image": PATH, "text": ...}, {"video": PATH, "text": ...}, or a document {"texts": [...], "images": [PATH, ...]}
           with null where the other list has its part; paths are relative to the JSONL
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.data.records import IMAGES, VIDEOS
from training.data.shards import RawRecord


class MakeError(ValueError):
    """A line or a file of the source that cannot become a record; the message names it."""


def from_folder(folder: Path) -> Iterator[RawRecord]:
    for file in sorted(folder.rglob("*")):
        extension = file.suffix.lower().lstrip(".")
        text = file.with_suffix(".txt")
        if extension in IMAGES + VIDEOS and text.exists():
            yield RawRecord(str(file.relative_to(folder)), {extension: file.read_bytes(), "txt": text.read_bytes()})


def from_jsonl(file: Path) -> Iterator[RawRecord]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield RawRecord(f"{file}:{number}", _files(json.loads(line), file.parent))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise MakeError(f"{file}, line {number}: {error!r}") from None


def _files(entry: dict[str, Any], root: Path) -> dict[str, bytes]:
    if "texts" not in entry:
        path = root / (entry["image"] if "image" in entry else entry["video"])
        return {path.suffix.lower().lstrip("."): path.read_bytes(), "txt": entry["text"].encode()}
    images: list[str | None] = []
    files: dict[str, bytes] = {}
    for place, image in enumerate(entry["images"]):
        if image is not None:
            name = f"{place}{Path(image).suffix.lower()}"
            files[name] = (root / image).read_bytes()
        images.append(None if image is None else name)
    return {"json": json.dumps({"texts": entry["texts"], "images": images}).encode(), **files}


def write_shards(records: Iterable[RawRecord], folder: Path, per_shard: int) -> int:
    """Gives the number of records written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for shard, together in enumerate(_batches(records, per_shard)):
        with tarfile.open(folder / f"{shard:06}.tar", "w") as archive:
            for number, record in enumerate(together, written):
                _add(archive, f"{number:09}", record)
        written += len(together)
    return written


def _batches(records: Iterable[RawRecord], size: int) -> Iterator[list[RawRecord]]:
    together: list[RawRecord] = []
    for record in records:
        together.append(record)
        if len(together) == size:
            yield together
            together = []
    if together:
        yield together


def _add(archive: tarfile.TarFile, key: str, record: RawRecord) -> None:
    for extension, content in record.files.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data.make", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-shard", type=int, default=1000)
    options = parser.parse_args()
    source: Path = options.source
    try:
        records = from_folder(source) if source.is_dir() else from_jsonl(source)
        print(f"{write_shards(records, options.out, options.per_shard)} records in {options.out}")
    except (MakeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
