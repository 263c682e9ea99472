"""Tests of the files that are taken from a folder: formats, order, labels, and what is refused."""

from __future__ import annotations

import io
import mimetypes
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from flamboyance_client import media_files
from flamboyance_client.folders import MEDIA_TYPES, SUFFIXES, empty_subfolders, labelled_files, other_files
from flamboyance_client.labelled import with_ids
from flamboyance_client.prompt import media_type
from model import heif
from model.media import MediaError, media_type_of

FORMATS = {".jpg": "JPEG", ".JPEG": "JPEG", ".png": "PNG", ".PNG": "PNG", ".webp": "WEBP", ".GIF": "GIF"} | {
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".TIFF": "TIFF",
    ".avif": "AVIF",
}


def picture(file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(stream, file_format)
    return stream.getvalue()


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_each_subfolder_is_a_label_and_the_order_is_fixed(tmp_path: Path) -> None:
    write(
        tmp_path, **{f"{label}/{name}.png": picture() for label in ("wren", "coal tit") for name in ("2", "10", "a/1")}
    )
    files = labelled_files(tmp_path)
    assert [(item.file, item.label) for item in files] == [
        ("coal tit/10.png", "coal tit"),
        ("coal tit/2.png", "coal tit"),
        ("coal tit/a/1.png", "coal tit"),
        ("wren/10.png", "wren"),
        ("wren/2.png", "wren"),
        ("wren/a/1.png", "wren"),
    ]
    assert [item.media for item in files] == [tmp_path / item.file for item in files]


def test_every_format_of_the_server_is_taken_in_upper_and_lower_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mimetypes, "guess_type", lambda name: (None, None))  # the system may not know a format
    write(tmp_path, **{f"a{suffix}": picture(name) for suffix, name in FORMATS.items()})
    write(tmp_path, **{"b.mp4": b"\0\0\0\x18ftypisom", "c.WEBM": b"\x1a\x45\xdf\xa3", "d.mkv": b"\x1a\x45\xdf\xa3"})
    assert len(media_files(tmp_path)) == len(FORMATS) + 3
    assert {suffix.lower() for suffix in FORMATS} <= SUFFIXES


def test_hidden_files_and_other_files_are_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, **{"a/1.png": picture(), "a/.2.png": b"", ".git/3.png": b"", "a/Thumbs.db": b"x", "notes.txt": b"x"}
    )
    write(tmp_path, **{"a/._1.png": b"AppleDouble", "a/.DS_Store": b"x"})
    assert media_files(tmp_path) == [tmp_path / "a" / "1.png"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("1.jpg", b"", "0 bytes"),
        ("1.png", b"<html>not found</html>", "an unknown format"),
        ("1.ico", picture("ICO"), "an unknown format"),
        ("1.avi", b"RIFF\x18\0\0\0AVI LIST", "video/x-msvideo"),
    ],
)
def test_a_file_that_the_server_cannot_read_is_named(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    write(tmp_path, **{f"a/{name}": data})
    formats = (
        "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and, with the extra heif, HEIC images; MP4, WebM and Matroska videos"
    )
    with pytest.raises(ValueError, match=formats) as caught:
        labelled_files(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'a' / name} ({reason}) cannot be read as an image or a video;")


def test_all_files_that_the_server_cannot_read_are_named(tmp_path: Path) -> None:
    write(tmp_path, **{f"a/{number:02}.png": b"" for number in range(23)}, **{"a/good.png": picture()})
    (tmp_path / "a" / "00.png").unlink()
    (tmp_path / "a" / "00.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"19\.png \(0 bytes\) and 3 more cannot be read as images or videos;"
    ) as caught:
        labelled_files(tmp_path)
    names = re.findall(r"(\d+)\.png \((.*?)\)", str(caught.value))
    assert names == [("00", "No such file or directory"), *((f"{number:02}", "0 bytes") for number in range(1, 20))]


def test_a_file_outside_of_the_subfolders_has_no_label(tmp_path: Path) -> None:
    write(tmp_path, **{"a/1.png": picture(), "2.png": picture()})
    with pytest.raises(ValueError, match=r"2\.png has no label: move it into a subfolder"):
        labelled_files(tmp_path)
    write(tmp_path, **{"3.png": picture()})
    with pytest.raises(ValueError, match=r"2\.png, .*3\.png have no labels: move them into a subfolder"):
        labelled_files(tmp_path)


def test_one_name_in_two_unicode_forms_is_one_label(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for name in (composed, decomposed):
        write(tmp_path / name, **{"1.png": picture()})
    files = labelled_files(tmp_path)
    assert [file.label for file in files] == [composed] * 2
    assert {Path(file.name).parent.name for file in files} == {composed, decomposed}
    assert len({file.id for file in with_ids(files)}) == 2


def test_a_folder_without_media_is_refused(tmp_path: Path) -> None:
    write(tmp_path, **{"a/notes.txt": b"x"})
    with pytest.raises(ValueError, match="no images or videos in subfolders; expected files such as"):
        labelled_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        labelled_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"notes\.txt is a file; a folder whose subfolders are named after the labels"):
        labelled_files(tmp_path / "a" / "notes.txt")


def test_a_subfolder_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", **{"1.png": picture()})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "wren").symlink_to(tmp_path / "elsewhere")
    assert [item.label for item in labelled_files(tmp_path / "set")] == ["wren"]


def test_a_link_to_a_folder_that_contains_it_is_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "set", **{f"{label}/1.png": picture() for label in ("wren", "coal tit")})
    (root / "wren" / "all").symlink_to(root)
    (root / "wren" / "up").symlink_to("..")
    (root / "coal tit" / "self").symlink_to(root / "coal tit")
    (root / "again").symlink_to(root)
    assert [item.file for item in labelled_files(root)] == ["coal tit/1.png", "wren/1.png"]
    (tmp_path / "linked").symlink_to(root)
    assert [item.file for item in labelled_files(tmp_path / "linked")] == ["coal tit/1.png", "wren/1.png"]
    assert empty_subfolders(root) == ["again"]


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = write(tmp_path / "set", **{"a/1.png": picture(), "b/2.png": picture()})
    (root / "a" / "b").symlink_to(root / "b")
    (root / "b" / "a").symlink_to(root / "a")
    assert [item.file for item in labelled_files(root)] == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]


def test_each_folder_is_read_once_for_a_label(tmp_path: Path) -> None:
    names = [f"l{number}" for number in range(6)]
    root = write(tmp_path / "set", **{f"{name}/{name}.png": picture() for name in names})
    for name in names:
        for other in {*names} - {name}:
            (root / name / f"to-{other}").symlink_to(Path("..") / other)
    files = [(item.label, item.media.name) for item in labelled_files(root) if isinstance(item.media, Path)]
    assert sorted(files) == [(label, f"{name}.png") for label in names for name in names]


def test_a_pipe_is_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "set", **{"wren/1.png": picture(), "robin/notes.txt": b"x"})
    for name in ("wren/2.png", "robin/1.png"):
        os.mkfifo(root / name)
    assert media_files(root) == [root / "wren" / "1.png"]
    assert other_files(root) == ["robin/1.png", "robin/notes.txt", "wren/2.png"]
    assert empty_subfolders(root) == ["robin"]


def test_files_and_folders_may_be_linked_more_than_once(tmp_path: Path) -> None:
    root = write(tmp_path / "set", **{"wren/1.png": picture(), "wren/young/2.png": picture()})
    (root / "wren" / "3.png").symlink_to(root / "wren" / "1.png")
    (root / "bird").symlink_to(root / "wren")
    (root / "small").mkdir()
    (root / "small" / "young").symlink_to(root / "wren" / "young")
    names = ["1.png", "3.png", "young/2.png"]
    expected = [*(f"bird/{name}" for name in names), "small/young/2.png", *(f"wren/{name}" for name in names)]
    assert [item.file for item in labelled_files(root)] == expected


@pytest.mark.parametrize(
    "start",
    [
        *(picture(name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")),
        b"\0\0\0\x18ftypavis",
        b"\0\0\0\x18ftypheic",
        b"\0\0\0\x18ftypmif1",
        b"\0\0\0\x18ftypmsf1",
        b"\0\0\0\x18ftyphevc",
        b"MM\0*\0\0\0\x08",
        b"\0\0\0\x18ftypisom",
        b"\0\0\0\x14ftypqt  ",
        b"\x1a\x45\xdf\xa3\x01webm",
        b"RIFF\x18\0\0\0AVI LIST",
        b"text",
    ],
    ids=lambda start: repr(start[:12]),
)
def test_the_formats_are_those_of_the_server(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "is_installed", lambda: True)
    try:
        kind = media_type_of(start)
    except MediaError:
        kind = None
    assert (media_type(start) in MEDIA_TYPES) == (kind is not None)
