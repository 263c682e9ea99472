"""The media of a command: files, the files of folders, and URLs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from flamboyance_client.cli.connection import note
from flamboyance_client.folders import media_files
from flamboyance_client.prompt import is_url
from flamboyance_client.records import SupportSet
from flamboyance_client.uploads import set_name

Source = str | Path

Sources = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE", help="Images, videos, or folders of them; or URLs that the server permits."),
]


def name_of(folder: Path, otherwise: str) -> str:
    """Return the name of the set of a folder. A note has it if the folder's own name has other characters.

    Raises `ValueError`, which says what to do `otherwise`, for a folder whose name has none of those that names may have.
    """
    name = set_name(folder, otherwise)
    if name != folder.resolve().name:
        note(f"the set of {folder} has the name {name}")
    return name


def note_removed(support_set: SupportSet) -> None:
    """Note how many examples the upload of a folder has removed, if any."""
    if support_set.num_removed:
        note(f"examples removed, which an earlier upload wrote and whose files are gone: {support_set.num_removed}")


def media_sources(texts: Sequence[str], files_of: Callable[[Path], list[Path]] = media_files) -> list[Source]:
    """Return the URLs and the files, and the files of folders. Raises `ValueError` for a folder without any.

    With `named_media_files` as `files_of`, a file that the server cannot read is an error only when it is sent.
    """
    return [source for text in texts for source in _sources(text, files_of)]


def _sources(text: str, files_of: Callable[[Path], list[Path]]) -> list[Source]:
    if is_url(text):
        return [text]
    path = Path(text)
    files: list[Source] = [*files_of(path)] if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no images or videos")
    return files
