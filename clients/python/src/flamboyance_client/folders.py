"""Images and videos in folders: their paths in a fixed order, and their labels from the names of subfolders."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

from flamboyance_client.labelled import LabelledMedia, Unreadable
from flamboyance_client.prompt import media_type

# The formats that the server reads, by the names of files and by their first bytes; HEIC if it has the extra `heif`.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif", ".hif"),
)
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
SUFFIXES = frozenset(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
HEIF_TYPES = frozenset(f"image/{name}" for name in ("heic", "heic-sequence", "heif", "heif-sequence"))
IMAGE_TYPES = HEIF_TYPES | {f"image/{name}" for name in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")}
MEDIA_TYPES = IMAGE_TYPES | {"video/mp4", "video/webm"}
FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and, with the extra heif, HEIC images; MP4, WebM and Matroska videos"
SIGNATURE_BYTES = 32
# of a list in a message
MAX_NAMES = 20


class UnreadableFiles(ValueError):
    """Raised for files with the names of images or videos that have other content, or that cannot be opened."""


def media_files(folder: str | Path) -> list[Path]:
    """Return the images and videos in a folder and its subfolders, sorted by path.

    Hidden files, files of other kinds, such as `Thumbs.db` and `notes.txt`, and pipes are left out. Raises `ValueError`
    for an image or a video that the server cannot read, and `OSError` for a folder that cannot be read. Links are
    followed, and below a subfolder each folder is read once, however many links lead to it.
    """
    paths, faults = _readable(named_media_files(folder))
    _raise_for(faults)
    return paths


def named_media_files(folder: str | Path) -> list[Path]:
    """Return the files of `media_files`, without reading their first bytes."""
    return [path for path in _files(Path(folder)) if _is_media(path)]


def labelled_files(folder: str | Path) -> list[LabelledMedia]:
    """Return the images and videos in the subfolders of a folder. The name of the subfolder is the label, in NFC.

    Some file systems and programs write é as one character and others as two; both are one label.

    Raises what `media_files` raises, and `ValueError` for a folder without any and for files that are in no subfolder.
    """
    root = _folder_of_labels(folder)
    return _not_empty(_labelled(media_files(root), root), root)


def readable_labelled_files(folder: str | Path) -> tuple[list[LabelledMedia], list[Unreadable]]:
    """Return the files of `labelled_files` that the server can read, and the others.

    Raises what `labelled_files` raises, for a file that the server cannot read only if there is no other.
    """
    root = _folder_of_labels(folder)
    paths, faults = _readable(named_media_files(root))
    if not paths:
        _raise_for(faults)
    unreadable = zip(_labelled(list(faults), root), faults.values(), strict=True)
    return _not_empty(_labelled(paths, root), root), list(unreadable)


def label_of(file: Path, folder: str | Path) -> str:
    """Return the label of a file in a subfolder: the name of the subfolder, in NFC."""
    return normalize("NFC", file.relative_to(folder).parts[0])


def empty_subfolders(folder: str | Path) -> list[str]:
    """Return the names of the subfolders without an image or a video, which give no label. Hidden ones are left out."""
    root = Path(folder)
    folders = [entry for entry in _entries(root) if entry.is_dir()]
    return [entry.name for entry in folders if not any(map(_is_media, _files_below(entry, {root.resolve()})))]


def other_files(folder: str | Path) -> list[str]:
    """Return the paths, in the folder, of files that are no images or videos. Hidden ones are left out."""
    return [str(path.relative_to(folder)) for path in _files(Path(folder)) if not _is_media(path)]


def listed(names: Sequence[str], most: int = MAX_NAMES) -> str:
    """Return the first of the names and the number of the rest, as a text."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _folder_of_labels(folder: str | Path) -> Path:
    root = Path(folder)
    if root.is_file():
        raise ValueError(f"{root} is a file; a folder whose subfolders are named after the labels is needed")
    return root


def _not_empty(files: list[LabelledMedia], root: Path) -> list[LabelledMedia]:
    if not files:
        raise ValueError(
            f"{root}: no images or videos in subfolders; expected files such as {root / 'LABEL' / '1.jpg'}"
        )
    return files


def _labelled(paths: Sequence[Path], root: Path) -> list[LabelledMedia]:
    if unlabelled := [str(path) for path in paths if path.parent == root]:
        what = "has no label: move it" if len(unlabelled) == 1 else "have no labels: move them"
        raise ValueError(f"{listed(unlabelled)} {what} into a subfolder of {root}, whose name is the label")
    return [
        LabelledMedia(name=str(path), file=path.relative_to(root).as_posix(), media=path, label=label_of(path, root))
        for path in paths
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Return the files that are not hidden, sorted by path. A subfolder may be a symbolic link."""
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files_below(entry, {folder.resolve()})
        else:
            yield entry


def _files_below(folder: Path, read: set[Path]) -> Iterator[Path]:
    """Return the files of a folder, unless it has been read, by this path or by another.

    Links between folders would give each file as many paths as there are ways to it. The folders are added to `read`.
    """
    if (target := folder.resolve()) in read:
        return
    read.add(target)
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files_below(entry, read)
        else:
            yield entry


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]


def _is_media(path: Path) -> bool:
    kind = mimetypes.guess_type(path.name)[0] or ""
    is_named = path.suffix.lower() in SUFFIXES or kind.startswith(("image/", "video/"))
    # to read a pipe may take for ever; a broken link is an error, which the caller reports
    return is_named and (path.is_file() or not path.exists())


def _readable(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Return the files whose first bytes are those of formats that the server reads, and the others with the reason."""
    faults = {path: fault for path in paths if (fault := _fault(path))}
    return [path for path in paths if path not in faults], faults


def _raise_for(faults: Mapping[Path, str]) -> None:
    if faults:
        kind = "an image or a video" if len(faults) == 1 else "images or videos"
        names = listed([f"{path} ({fault})" for path, fault in faults.items()])
        raise UnreadableFiles(f"{names} cannot be read as {kind}; the server reads {FORMATS}")


def _fault(path: Path) -> str | None:
    """Return why the server cannot read a file, or None."""
    try:
        with path.open("rb") as file:
            start = file.read(SIGNATURE_BYTES)
    except OSError as error:
        return error.strerror or type(error).__name__
    if media_type(start) in MEDIA_TYPES:
        return None
    return media_type(start) or ("an unknown format" if start else "0 bytes")
