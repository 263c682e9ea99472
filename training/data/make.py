"""Build shards from a folder of media files with texts, or from a JSONL file.

`python -m training.data.make SOURCE --out DIR`, where SOURCE is:

a folder   every image or video that has a .txt file of the same name next to it
a JSONL    one object per line: {"image": PATH, "text": ...}, {"video": PATH, "text": ...}, or a document
           {"texts": [...], "images": [PATH, ...]} with null where the other list has its part; paths are relative to the
           JSONL file, and another field is an error
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training.data.records import IMAGES, VIDEOS, check_lists, is_url
from training.data.shards import RawRecord

TEXT, SHARDS = ".txt", "*.tar"


class SourceError(ValueError):
    """A line of the source that is not a valid record; the message names it."""


class TargetError(ValueError):
    """A folder to which no shards can be written."""


def from_folder(folder: Path) -> Iterator[RawRecord]:
    for file in _labelled(folder):
        extension, text = _extension(file), file.with_suffix(TEXT)
        try:
            if not text.read_text(encoding="utf-8-sig").strip():
                raise SourceError(f"{text} has no text")
        except UnicodeDecodeError as error:
            raise SourceError(f"{text} is not UTF-8: {error}") from None
        yield RawRecord(str(file.relative_to(folder)), {extension: file.read_bytes(), "txt": text.read_bytes()})


def passed_over(folder: Path, out: Path) -> list[Path]:
    """Return the files of a folder that are in no record: of other formats, without a text, or texts alone.

    The shards in `out`, which may be below the folder, are not among them.
    """
    labelled = _labelled(folder)
    used = {*labelled, *(file.with_suffix(TEXT) for file in labelled)}
    written = {file.resolve() for file in out.glob(SHARDS)}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file not in used]
    return [file for file in files if file.resolve() not in written]


def _labelled(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*"))
    return [file for file in files if _extension(file) in IMAGES + VIDEOS and file.with_suffix(TEXT).exists()]


def _extension(file: Path) -> str:
    return file.suffix.lower().lstrip(".")


def from_jsonl(file: Path) -> Iterator[RawRecord]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # a file of Windows begins with a byte order mark
                entry = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                yield RawRecord(f"{file}:{number}", _files(entry, file.parent))
            except FileNotFoundError as error:
                raise SourceError(f"{file}, line {number}: there is no file {error.filename}") from None
            except (OSError, ValueError, RecursionError) as error:
                raise SourceError(f"{file}, line {number} is not a valid record: {error}") from None


def _files(entry: Any, root: Path) -> dict[str, bytes]:
    """Return the files of a record by extension; raises ValueError for one that no set would read."""
    if not isinstance(entry, dict):
        raise ValueError(f"it is {entry!r:.60}, must be an object")
    return _document(entry, root) if "texts" in entry else _pair(entry, root)


def _pair(entry: Mapping[str, Any], root: Path) -> dict[str, bytes]:
    keys = [key for key in ("image", "video") if key in entry]
    if len(keys) != 1:
        raise ValueError(f"it needs either image or video, or texts and images; its fields are {', '.join(entry)}")
    _check_fields(entry, (keys[0], "text"))
    file, text = entry[keys[0]], entry.get("text")
    if not isinstance(file, str):
        raise ValueError(f"{keys[0]} is {file!r:.60}, must be the path of a file")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text is {text!r:.60}, must be a string with words")
    formats = IMAGES if keys[0] == "image" else VIDEOS
    if (extension := _extension(Path(file))) not in formats:
        raise ValueError(f"{keys[0]} is {file!r:.60}, must be one of the formats {', '.join(formats)}")
    return {extension: (root / file).read_bytes(), "txt": text.encode()}


def _check_fields(entry: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ValueError for a field that would be ignored, such as a misspelt one."""
    if unknown := [name for name in entry if name not in known]:
        raise ValueError(f"it has the unknown field {', '.join(unknown)!s:.60}, must have only {' and '.join(known)}")


def _document(entry: Mapping[str, Any], root: Path) -> dict[str, bytes]:
    """Return a document with the files of its images. An image that is a URL stays one: training skips it."""
    _check_fields(entry, ("texts", "images"))
    images: list[str | None] = []
    files: dict[str, bytes] = {}
    for i, (_, image) in enumerate(check_lists(entry)):
        name = image
        if image is not None and not is_url(image):
            name = f"{i}{Path(image).suffix.lower()}"
            files[name] = (root / image).read_bytes()
        images.append(name)
    return {"json": json.dumps({"texts": entry["texts"], "images": images}).encode(), **files}


def write_shards(records: Iterable[RawRecord], folder: Path, per_shard: int) -> int:
    """Write the records to tar files of `per_shard` records and return the number of records written.

    The folder gets all shards at the end, or none. Raises TargetError for a folder that has shards: a run would read both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.glob(SHARDS)):
        raise TargetError(
            f"{folder} has {len(old)} .tar files, such as {old[0].name}: remove them or name another folder"
        )
    num_written = 0
    with TemporaryDirectory(dir=folder, prefix=".") as partial:
        for shard, batch in enumerate(_batches(records, per_shard)):
            with tarfile.open(Path(partial) / f"{shard:06}.tar", "w") as archive:
                for number, record in enumerate(batch, num_written):
                    _add(archive, f"{number:09}", record)
            num_written += len(batch)
        for file in sorted(Path(partial).iterdir()):
            file.rename(folder / file.name)
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


def _positive(text: str) -> int:
    if not text.isdecimal() or not (number := int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.make",
        description=__doc__,
        # the description lists the sources in columns
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder or a JSONL file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--per-shard", type=_positive, default=1000, help="records per shard (default: %(default)s)")
    options = parser.parse_args()
    source: Path = options.source
    try:
        records = from_folder(source) if source.is_dir() else from_jsonl(source)
        if not (num_written := write_shards(records, options.out, options.per_shard)):
            raise SourceError(f"{source} has no record: no line, or no image or video with a text of the same name")
        print(f"{num_written} records in {options.out}")
    except FileNotFoundError as error:
        sys.exit(f"error: there is no file {error.filename}")
    except (SourceError, TargetError, OSError) as error:
        sys.exit(f"error: {error}")
    if source.is_dir() and (files := passed_over(source, options.out)):
        print(f"{len(files)} files are in no record, such as {files[0]}")


if __name__ == "__main__":
    main()
