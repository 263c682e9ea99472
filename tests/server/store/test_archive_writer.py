"""Archives are plain ZIP files, written piece by piece: the same version gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from server.errors import MediaNotFound
from server.media.store import MediaStore
from server.store.archive_writer import write_archive
from server.store.examples import Examples
from server.store.records import Example, SupportSet
from tests.server.archives import unpacked
from tests.server.conftest import png


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(str(tmp_path / "media"))


def support_set(*examples: Example) -> SupportSet:
    return SupportSet(id="ss_1", name="s", version=3, examples=Examples(examples))


def test_an_archive_holds_the_manifest_the_examples_and_the_bytes_of_the_media(store: MediaStore) -> None:
    red, blue = store.put(png("red"), "image"), store.put(b"not an image", "video")
    examples = (
        Example("a", (red, blue), text="t", label="l", question="?", metadata_json='{"x": [null]}'),
        Example("b", (red,)),
        Example("c", (), text="ünïcode\n"),
    )
    files = unpacked(b"".join(write_archive(support_set(*examples), {"owner": "me"}, store)))
    media = [
        {"type": "image", "file": f"media/{red}.png", "sha256": hashlib.sha256(png("red")).hexdigest()},
        {"type": "video", "file": f"media/{blue}", "sha256": hashlib.sha256(b"not an image").hexdigest()},
    ]
    assert list(files) == [media[0]["file"], media[1]["file"], "examples.jsonl", "manifest.json"]
    assert (files[media[0]["file"]], files[media[1]["file"]]) == (png("red"), b"not an image")
    assert [json.loads(line) for line in files["examples.jsonl"].splitlines()] == [
        {"id": "a", "media": media, "text": "t", "question": "?", "label": "l", "metadata": {"x": [None]}},
        {"id": "b", "media": media[:1]},
        {"id": "c", "text": "ünïcode\n"},
    ]
    assert json.loads(files["manifest.json"]) == {
        "format": "flamboyance.support_set",
        "format_version": 1,
        "name": "s",
        "metadata": {"owner": "me"},
        "num_examples": 3,
        "num_media": 2,
        "exported_from": {"support_set": "ss_1", "version": 3},
    }


def test_a_version_always_gives_the_same_bytes(store: MediaStore) -> None:
    examples = (Example("a", (store.put(png("red"), "image"),), text="t"),)
    first, second = (b"".join(write_archive(support_set(*examples), {}, store)) for _ in range(2))
    assert first == second


def test_unpacked_files_may_be_read(store: MediaStore) -> None:
    data = b"".join(write_archive(support_set(Example("a", (), text="t")), {}, store))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert [oct(entry.external_attr >> 16) for entry in file.infolist()] == ["0o644"] * 2


def test_no_media_item_is_in_memory_whole(store: MediaStore) -> None:
    size = 2**20
    media = tuple(store.put(bytes([index]) * size, "image") for index in range(12))
    tracemalloc.start()
    try:
        num_bytes = sum(map(len, write_archive(support_set(Example("a", media)), {}, store)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes > 12 * size
    assert peak < size * 3 // 4


def test_a_media_item_is_opened_twice(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_file(system: LocalFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return open_any(system, path, *arguments, **options)

    media = [store.put(png(colour), "image") for colour in ("red", "blue")]
    opened, open_any = list[str](), LocalFileSystem.open
    monkeypatch.setattr(LocalFileSystem, "open", open_file)
    files = unpacked(b"".join(write_archive(support_set(Example("a", tuple(media))), {}, store)))
    assert opened == [media[0], media[0], media[1], media[1]]
    assert {f"media/{media_id}.png" for media_id in media} < files.keys()


def test_examples_come_in_pieces(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.store.archive_writer.PIECE_BYTES", 64)
    examples = tuple(Example(f"e{index}", (), text=f"text of {index}") for index in range(100))
    pieces = list(write_archive(support_set(*examples), {}, store))
    assert len(pieces) > 20
    lines = unpacked(b"".join(pieces))["examples.jsonl"].splitlines()
    assert [json.loads(line)["id"] for line in lines] == [example.id for example in examples]


def test_a_media_item_that_is_gone_ends_the_archive(store: MediaStore) -> None:
    media = [store.put(png(colour), "image") for colour in ("red", "blue")]
    pieces: Iterator[bytes] = write_archive(support_set(Example("a", tuple(media))), {}, store)
    assert png("red") in next(pieces)
    store.delete(media[1])
    with pytest.raises(MediaNotFound):
        next(pieces)
