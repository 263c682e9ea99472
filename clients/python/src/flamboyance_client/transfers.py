"""Files that are sent and received piece by piece, with a progress bar in a notebook or on a terminal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never
from zipfile import BadZipFile, ZipFile

from tqdm.auto import tqdm

PIECE_BYTES = 2**18
ARCHIVE_TYPE = "application/zip"


def read_file(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces."""
    with path.open("rb") as file, _progress_bar(path, path.stat().st_size) as bar:
        while piece := file.read(PIECE_BYTES):
            yield piece
            bar.update(len(piece))


async def read_file_async(path: Path) -> AsyncIterator[bytes]:
    """Yield a file in pieces, which a thread reads."""
    pieces = read_file(path)
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece


@contextmanager
def written_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that writes pieces of a file, which has its name only when it is complete."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file, _progress_bar(path, None) as bar:

            def write(piece: bytes) -> None:
                file.write(piece)
                bar.update(len(piece))

            yield write
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def archive_path(path: str | Path, name: str) -> Path:
    """Return the path of an exported set: in a folder, the file has the set's name."""
    path = Path(path)
    return path / f"{name.replace(':', '_')}.zip" if path.is_dir() else path


def archived_name(path: Path) -> str | None:
    """Return the name of the support set in an archive, or None if it has none."""
    try:
        with ZipFile(path) as archive:
            name: str | None = json.loads(archive.read("manifest.json")).get("name")
            return name
    except (BadZipFile, KeyError, ValueError, AttributeError):
        return None


def _progress_bar(path: Path, total: int | None) -> tqdm[Never]:
    return tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None)
