"""The media store: the same bytes have one id, and a file is complete or absent, on a disk and in other filesystems."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from server.errors import MediaNotFound, StorageUnavailable
from server.media.source import encoded
from server.media.store import BLOCK, PIECE, UNFINISHED, UNFINISHED_SECONDS, LocalFolder, MediaStore, StoredMedia
from tests.server.conftest import png

ROOT = Path(__file__).resolve().parents[3]
RED = png("red")


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MediaStore:
    return MediaStore(str(tmp_path / "media") if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def put_many(store: MediaStore, count: int) -> list[str]:
    return sorted(store.put(b"%d" % i, "image" if i % 3 else "video") for i in range(count))


def test_the_same_bytes_are_stored_once(store: MediaStore) -> None:
    name = store.put(RED, "image", size=(20, 10), num_frames=1)
    assert name == encoded(RED, "image", "").id
    first = store.describe(name)
    assert (first.kind, first.media_type, first.num_bytes) == ("image", "image/png", len(RED))
    assert (first.width, first.height, first.num_frames) == (20, 10, 1)
    assert store.put(RED, "image", size=(20, 10), num_frames=1) == name
    assert store.describe(name) == first
    assert list(store.names()) == [name]


def test_bytes_are_read_as_they_were_stored(store: MediaStore) -> None:
    for data in (RED, b"\n", b"{}\n\n", os.urandom(100_000)):
        media = store.get(store.put(data, "video"), param="image")
        assert (media.data, media.kind, media.param) == (data, "video", "image")
        assert media.digest == encoded(data, "video", "").digest
        assert store.describe(media.id).num_bytes == len(data)


def test_the_kind_is_part_of_the_id(store: MediaStore) -> None:
    image, video = store.put(b"x", "image"), store.put(b"x", "video")
    assert (image[:4], video[:4]) == ("img_", "vid_")
    assert image[4:] != video[4:]


def test_media_stored_without_being_decoded_are_described_later(store: MediaStore) -> None:
    name = store.put(RED, "image")
    assert store.describe(name).width is None
    store.put(RED, "image", size=(20, 10), num_frames=1)
    store.put(RED, "image")
    assert store.describe(name).width == 20
    assert store.get(name).data == RED


def test_bytes_are_read_on_first_use(store: MediaStore) -> None:
    name = store.put(RED, "image")
    stored = store.find(name, param="prompt[0].image_id")
    assert (stored.id, stored.digest, stored.kind) == (name, encoded(RED, "image", "").digest, "image")
    assert (stored.is_in_memory, stored.num_bytes) == (False, len(RED))
    assert stored.data == RED
    store.delete(name)
    with pytest.raises(MediaNotFound) as caught:
        _ = stored.data
    assert caught.value.param == "prompt[0].image_id"


@pytest.mark.parametrize(
    "name", ["", "img_", "img_" + "0" * 64, "img_" + "A" * 64, "img_../../../etc/passwd", "img_" + "0" * 64 + "\n"]
)
def test_an_unknown_id_is_not_found(store: MediaStore, name: str) -> None:
    store.put(RED, "image")
    assert not store.exists(name)
    for read in (store.get, store.find, store.describe, store.delete):
        with pytest.raises(MediaNotFound, match="no image or video has the id"):
            read(name)


def test_names_are_listed_in_order_after_any_name(store: MediaStore) -> None:
    names = put_many(store, 60)
    assert list(store.names()) == names
    for index in (0, 17, 59):
        assert list(store.names(after=names[index])) == names[index + 1 :]
    images = [name for name in names if name.startswith("img_")]
    assert list(store.names("image")) == images
    assert list(store.names("video")) == [name for name in names if name not in images]
    assert list(store.names("image", after=images[3])) == images[4:]
    store.delete(names[0])
    assert list(store.names()) == names[1:]


def test_an_empty_store_has_no_names(store: MediaStore) -> None:
    assert list(store.names()) == []
    assert not store.exists("img_" + "0" * 64)
    store.sweep()


def test_two_stores_of_one_folder_share_their_media(tmp_path: Path) -> None:
    store, other = MediaStore(str(tmp_path)), MediaStore(str(tmp_path))
    assert list(other.names()) == []
    name = store.put(RED, "image")
    assert list(other.names()) == [name]
    other.delete(name)
    assert list(store.names()) == []


@pytest.mark.parametrize("num_bytes", [1, 1000, PIECE - 400, 2 * PIECE - 300, 3 * PIECE, 3 * PIECE + 1])
def test_pieces_are_the_bytes_up_to_damage(num_bytes: int, tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    for length in range(num_bytes, num_bytes + 300, 37):  # the file's first line has a few hundred bytes
        data = random.Random(length).randbytes(length)
        name = store.put(data, "image")
        pieces = list(store.pieces(name))
        assert b"".join(pieces) == data
        assert max(map(len, pieces)) <= PIECE
        file = tmp_path / name[:6] / name
        for damaged in (file.read_bytes()[:-1], file.read_bytes() + b"?"):
            file.write_bytes(damaged)
            received: list[bytes] = []
            with pytest.raises(MediaNotFound):
                received.extend(store.pieces(name))
            assert sum(map(len, received)) < length


def test_a_file_that_is_deleted_or_written_again_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    store, data = MediaStore(str(tmp_path)), random.Random(0).randbytes(3 * PIECE)
    name = store.put(data, "image")
    written, deleted = store.pieces(name), store.pieces(name)
    received = [next(written), next(deleted)]
    store.put(data, "image", size=(4000, 3000), num_frames=1)  # with a longer first line
    assert b"".join([received[0], *written]) == data
    store.delete(name)
    assert b"".join([received[1], *deleted]) == data


class RangeFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file of an object store, which is fetched in ranges of bytes."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path, start=start, end=end)
        self.fs.fetched.append(len(data))
        return data


class ObjectStore(MemoryFileSystem):  # type: ignore[misc]
    protocol = "ranges"
    fetched: ClassVar[list[int]] = []

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, block_size, **options)
        return RangeFile(self, path, mode, block_size or 50 * 2**20)


def test_pieces_of_an_object_store_are_fetched_as_they_are_read() -> None:
    fsspec.register_implementation("ranges", ObjectStore, clobber=True)
    store, data = MediaStore("ranges://pieces"), random.Random(0).randbytes(5 * BLOCK)
    pieces = store.pieces(store.put(data, "image"))
    first = next(pieces)
    assert sum(ObjectStore.fetched) <= BLOCK + 2 * PIECE
    assert b"".join([first, *pieces]) == data
    assert len(ObjectStore.fetched) < 8


def test_a_damaged_file_is_not_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MediaStore(str(tmp_path))
    name = store.put(RED, "image")
    file = tmp_path / name[:6] / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MediaNotFound):
        store.get(name)
    with pytest.raises(MediaNotFound):
        next(store.pieces(name))
    assert "damaged" in caplog.text
    store.delete(name)
    assert store.get(store.put(RED, "image")).data == RED


@pytest.mark.parametrize("header", [b"", b"\x00" * 40, b"{}", b'{"id":"\xff"}', b'{"id":"img_' + b"0" * 64])
def test_a_file_with_a_damaged_header_is_not_found(
    header: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = MediaStore(str(tmp_path))
    name = store.put(RED, "image", size=(20, 10), num_frames=1)
    file = tmp_path / name[:6] / name
    file.write_bytes(header + b"\n" + RED)
    for call in (store.get, store.find, store.describe):
        with pytest.raises(MediaNotFound):
            call(name)
    assert "damaged" in caplog.text
    assert not store.is_decoded(name)
    store.put(RED, "image")
    assert store.get(name).data == RED


def test_a_header_of_another_media_item_is_damaged(tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    name, other = store.put(RED, "image"), store.put(b"another", "image")
    (tmp_path / name[:6] / name).write_bytes((tmp_path / other[:6] / other).read_bytes())
    with pytest.raises(MediaNotFound):
        store.describe(name)


def test_a_storage_error_states_no_path(tmp_path: Path) -> None:
    (tmp_path / "media").write_bytes(b"a file where a folder should be")
    store = MediaStore(str(tmp_path / "media"))
    with pytest.raises(StorageUnavailable) as caught:
        store.put(RED, "image")
    assert str(tmp_path) not in caught.value.message


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    store = MediaStore(str(tmp_path))
    monkeypatch.setattr("server.media.store.os.fsync", full)
    with pytest.raises(StorageUnavailable, match="is not writable: its disk is full"):
        store.put(RED, "image")
    assert list(store.names()) == []
    assert list((tmp_path / UNFINISHED).iterdir()) == []
    (record,) = caplog.records
    assert record.exc_info is None
    assert record.__dict__["error"] == "[Errno 28] No space left on device"


def test_a_store_that_cannot_be_created_stops_no_start(tmp_path: Path) -> None:
    (tmp_path / "media").write_bytes(b"a file where a folder should be")
    store = MediaStore(str(tmp_path / "media"))
    store.prepare()
    with pytest.raises(StorageUnavailable):
        store.put(RED, "image")


@pytest.mark.parametrize("mount_point_stays", [False, True])
def test_a_folder_that_vanished_is_not_created_anew(mount_point_stays: bool, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "media", tmp_path / "elsewhere"
    store = MediaStore(str(root))
    store.prepare()
    name = store.put(RED, "image", size=(20, 10), num_frames=1)
    root.rename(elsewhere)
    if mount_point_stays:
        root.mkdir()
    for call in (store.find, store.get, store.describe, store.exists, store.delete):
        with pytest.raises(StorageUnavailable, match="the media folder is missing"):
            call(name)
    for data in (RED, b"another"):
        with pytest.raises(StorageUnavailable, match="the media folder is missing"):
            store.put(data, "image")
    with pytest.raises(StorageUnavailable, match="the media folder is missing"):
        list(store.names())
    if mount_point_stays:
        root.rmdir()
    assert not root.exists()
    elsewhere.rename(root)
    assert store.get(name).data == RED
    store.put(b"another", "image")


def test_a_folder_that_vanishes_during_a_write_is_not_created_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MediaStore(str(tmp_path / "media"))
    store.put(b"first", "image")

    def encode(header: StoredMedia) -> bytes:
        (tmp_path / "media").rename(tmp_path / "elsewhere")
        return b""

    monkeypatch.setattr("server.media.store.encode_header", encode)
    with pytest.raises(StorageUnavailable):
        store.put(RED, "image")
    assert not (tmp_path / "media").exists()


def test_old_unfinished_files_are_swept(tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    name = store.put(RED, "image")
    old, new = (tmp_path / UNFINISHED / name for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - UNFINISHED_SECONDS - 1))
    store.sweep()
    assert (old.exists(), new.exists()) == (False, True)
    assert list(store.names()) == [name]


def test_a_sweep_goes_on_after_a_file_that_another_server_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MediaStore(str(tmp_path))
    store.prepare()
    finished, old = (tmp_path / UNFINISHED / name for name in ("finished", "old"))
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([finished, old]))
    store.sweep()
    assert not old.exists()


# writes media of a few hundred kilobytes until it is killed; their bytes depend on their number alone
WRITER = """
import random, sys
from server.media.store import MediaStore

store, seed = MediaStore(sys.argv[1]), int(sys.argv[2])
for i in range(10**6):
    store.put(random.Random(seed * 10**6 + i).randbytes(300_000), "image")
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_no_half_media(tmp_path: Path) -> None:
    store, acknowledged, rng = MediaStore(str(tmp_path / "media")), set[str](), random.Random(0)
    unfinished = tmp_path / "media" / UNFINISHED
    for seed in range(200):
        if seed >= 12 and any(unfinished.iterdir()):
            break
        command = [sys.executable, "-c", WRITER, str(tmp_path / "media"), str(seed)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.random() * 0.05)
            process.kill()
            num_acknowledged = 1 + len(process.stdout.read().splitlines())
        acknowledged |= {
            encoded(random.Random(seed * 10**6 + i).randbytes(300_000), "image", "").id for i in range(num_acknowledged)
        }
    names = set(store.names())
    assert acknowledged <= names
    for name in names:  # each is complete, including those that were not acknowledged
        assert store.get(name).id == name
    # and some writer was killed while it was writing
    assert list(unfinished.iterdir())


def test_a_folder_that_another_thread_creates_meanwhile_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LocalFolder(str(tmp_path / "media"))

    def is_dir(_: Path) -> bool:
        folder.create()  # by the other thread, after this one has found none
        return False

    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_dir", is_dir)
        folder.require()
    folder.require()
    folder.unfinished.rmdir()
    with pytest.raises(StorageUnavailable, match="the media folder is missing"):
        folder.require()
