"""Files that are sent and received piece by piece, with a progress bar in a notebook or on a terminal."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4
from zipfile import BadZipFile, ZipFile

from flamboyance_client.errors import UnexpectedReply
from flamboyance_client.progress import visible_bar

PIECE_BYTES = 2**18
ARCHIVE_START = b"PK"
ARCHIVE_TYPE = "application/zip"


def size_of(path: Path) -> int | None:
    """Return the number of bytes of a file, or None for a pipe or a device, which does not state one."""
    return path.stat().st_size if path.is_file() else None


def read_file(path: Path, size: int | None) -> Iterator[bytes]:
    """Yield a file in pieces. Raises `OSError` for a file that has another size than the stated one."""
    remaining = math.inf if size is None else size
    with path.open("rb") as file, visible_bar(size, path.name, "B", unit_scale=True) as bar:
        while piece := file.read(PIECE_BYTES):
            remaining -= len(piece)
            if remaining < 0:
                break
            yield piece
            bar.update(len(piece))
    if size is not None and remaining:
        raise OSError(f"{path} has changed while it was sent")


async def read_file_async(path: Path, size: int | None) -> AsyncIterator[bytes]:
    """Yield a file in pieces, which a thread reads."""
    pieces = read_file(path, size)
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece


@contextmanager
def written_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that writes pieces of an archive, which has its name only when it is complete.

    A link stays, and the file that it leads to is replaced. A pipe or a device is written to as it is. Raises
    `UnexpectedReply` for what is no archive, such as the page of a proxy.
    """
    start = b""
    with _opened(path) as file, visible_bar(None, path.name, "B", unit_scale=True) as bar:

        def write(piece: bytes) -> None:
            nonlocal start
            start += piece[: len(ARCHIVE_START) - len(start)]
            if not ARCHIVE_START.startswith(start):
                raise UnexpectedReply(f"expected an archive, got {piece[:200]!r}")
            file.write(piece)
            bar.update(len(piece))

        yield write
        if start != ARCHIVE_START:
            raise UnexpectedReply(f"expected an archive, got {start!r}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    unfinished = target.with_name(f".{uuid4().hex}.part")
    with _errors_about(target.parent):
        file = unfinished.open("xb")
    try:
        with file:
            yield file
        with _errors_about(path):
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """Give errors the name of this file or folder in place of one that the caller does not know."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def archive_path(path: str | Path, name: str) -> Path:
    """Return the path of an exported set: in a folder, the file has the set's name, with %3A for a colon."""
    path = Path(path)
    return path / f"{name.replace(':', '%3A')}.zip" if path.is_dir() else path


def archived_name(path: Path) -> str | None:
    """Return the name of the support set in an archive, or None if it has none."""
    try:
        with ZipFile(path) as archive:
            name: str | None = json.loads(archive.read("manifest.json")).get("name")
            return name
    except (BadZipFile, KeyError, ValueError, AttributeError):
        return None
