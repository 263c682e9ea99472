"""Build shards from a folder of media files with texts, or from a JSONL file.

`python -m training.data.make SOURCE --out DIR`, where SOURCE is:

a folder   every image or video that has a .txt file of the same name next to it
a JSONL    one object per line: {"image": PATH, "text": ...}, {"video": PATH, "text": ...}, or a document
           {"texts": [...], "images": [PATH, ...]} with null where the other list has its part; paths are relative to the
           JSONL file
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


class SourceError(ValueError):
    """A line of the source that is not a valid record; the message names it."""


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
                raise SourceError(f"{file}, line {number} is not a valid record: {error!r}") from None


def _files(entry: dict[str, Any], root: Path) -> dict[str, bytes]:
    if "texts" not in entry:
        path = root / (entry["image"] if "image" in entry else entry["video"])
        return {path.suffix.lower().lstrip("."): path.read_bytes(), "txt": entry["text"].encode()}
    images: list[str | None] = []
    files: dict[str, bytes] = {}
    for i, image in enumerate(entry["images"]):
        if image is not None:
            name = f"{i}{Path(image).suffix.lower()}"
            files[name] = (root / image).read_bytes()
        images.append(None if image is None else name)
    return {"json": json.dumps({"texts": entry["texts"], "images": images}).encode(), **files}


def write_shards(records: Iterable[RawRecord], folder: Path, per_shard: int) -> int:
    """Write the records to tar files of `per_shard` records and return the number of records written."""
    folder.mkdir(parents=True, exist_ok=True)
    num_written = 0
    for shard, batch in enumerate(_batches(records, per_shard)):
        with tarfile.open(folder / f"{shard:06}.tar", "w") as archive:
            for number, record in enumerate(batch, num_written):
                _add(archive, f"{number:09}", record)
        num_written += len(batch)
    return num_written


def _batches(records: Iterable[RawRecord], size: int) -> Iterator[list[RawRecord]]:
    batch: list[RawRecord] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _add(archive: tarfile.TarFile, key: str, record: RawRecord) -> None:
    for extension, content in record.files.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data.make", description=__doc__)
    parser.add_argument("source", type=Path, help="a folder or a JSONL file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--per-shard", type=int, default=1000, help="records per shard (default: %(default)s)")
    options = parser.parse_args()
    source: Path = options.source
    try:
        records = from_folder(source) if source.is_dir() else from_jsonl(source)
        print(f"{write_shards(records, options.out, options.per_shard)} records in {options.out}")
    except (SourceError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
