"""Images and videos in folders: their paths in a fixed order, and their labels from the names of subfolders."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from pathlib import Path

from flamboyance_client.labelled import LabelledMedia
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


def media_files(folder: str | Path) -> list[Path]:
    """Return the images and videos in a folder and its subfolders, sorted by path.

    Hidden files and files of other kinds, such as `Thumbs.db` and `notes.txt`, are left out. Raises `ValueError` for an
    image or a video that the server cannot read, and `OSError` for a folder that cannot be read. Links are followed,
    except one to a folder that contains it.
    """
    return [_checked(path) for path in _files(Path(folder)) if _is_media(path)]


def labelled_files(folder: str | Path) -> list[LabelledMedia]:
    """Return the images and videos in the subfolders of a folder. The name of the subfolder is the label.

    Raises what `media_files` raises, and `ValueError` for a folder without any and for a file that is in no subfolder.
    """
    root = Path(folder)
    files = [_labelled(path, root) for path in media_files(root)]
    if not files:
        raise ValueError(
            f"{root}: no images or videos in subfolders; expected files such as {root / 'LABEL' / '1.jpg'}"
        )
    return files


def empty_subfolders(folder: str | Path) -> list[str]:
    """Return the names of the subfolders without an image or a video, which give no label. Hidden ones are left out."""
    root = Path(folder)
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    return [entry.name for entry in folders if not any(map(_is_media, _files(entry, frozenset({root.resolve()}))))]


def _labelled(path: Path, root: Path) -> LabelledMedia:
    relative = path.relative_to(root)
    if len(relative.parts) == 1:
        raise ValueError(f"{path} has no label: move it into a subfolder of {root}, whose name is the label")
    return LabelledMedia(name=str(path), file=relative.as_posix(), media=path, label=relative.parts[0])


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Return the files that are not hidden, sorted by path. A subfolder may be a symbolic link.

    A link to a folder that contains it leads to no new files: it is left out. `above` has the folders around this one.
    """
    if (target := folder.resolve()) in above:
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(entry, above | {target})
        else:
            yield entry


def _is_media(path: Path) -> bool:
    kind = mimetypes.guess_type(path.name)[0] or ""
    return path.suffix.lower() in SUFFIXES or kind.startswith(("image/", "video/"))


def _checked(path: Path) -> Path:
    """Return the path of a file whose first bytes are those of a format that the server reads."""
    with path.open("rb") as file:
        start = file.read(SIGNATURE_BYTES)
    if media_type(start) not in MEDIA_TYPES:
        what = media_type(start) or ("an unknown format" if start else "0 bytes")
        raise ValueError(f"{path} is not an image or video that the server reads ({what}); it reads {FORMATS}")
    return path
