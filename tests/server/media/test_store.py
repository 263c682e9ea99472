"""The media store: one id for the same bytes, whole or absent, on a disk and on any other filesystem."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from server.errors import MediaNotFound, StorageUnavailable
from server.media.source import source_digest
from server.media.store import UNFINISHED, UNFINISHED_SECONDS, MediaStore
from tests.server.conftest import picture

ROOT = Path(__file__).resolve().parents[3]
RED = picture("red")


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MediaStore:
    return MediaStore(str(tmp_path / "media") if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def put_many(store: MediaStore, number: int) -> list[str]:
    return sorted(store.put(b"%d" % i, "image" if i % 3 else "video") for i in range(number))


def test_the_same_bytes_are_one_media(store: MediaStore) -> None:
    name = store.put(RED, "image", size=(20, 10), num_frames=1)
    assert name == f"img_{source_digest(RED, 'image').hex()}"
    first = store.describe(name)
    assert (first.kind, first.media_type, first.num_bytes) == ("image", "image/png", len(RED))
    assert (first.width, first.height, first.num_frames) == (20, 10, 1)
    assert store.put(RED, "image", size=(20, 10), num_frames=1) == name
    assert store.describe(name) == first
    assert list(store.names()) == [name]


def test_what_comes_out_is_what_went_in(store: MediaStore) -> None:
    for data in (RED, b"\n", b"{}\n\n", os.urandom(100_000)):
        media = store.get(store.put(data, "video"), param="here")
        assert (media.data, media.kind, media.param) == (data, "video", "here")
        assert media.digest == source_digest(data, "video")
        assert store.size(media.id) == len(data)


def test_the_kind_is_part_of_the_id(store: MediaStore) -> None:
    image, video = store.put(b"x", "image"), store.put(b"x", "video")
    assert (image[:4], video[:4]) == ("img_", "vid_")
    assert image[4:] != video[4:]


def test_what_was_stored_undecoded_is_described_once_it_is_decoded(store: MediaStore) -> None:
    name = store.put(RED, "image")
    assert store.describe(name).width is None
    store.put(RED, "image", size=(20, 10), num_frames=1)
    store.put(RED, "image")
    assert store.describe(name).width == 20
    assert store.get(name).data == RED


def test_bytes_are_read_when_they_are_asked_for(store: MediaStore) -> None:
    name = store.put(RED, "image")
    found = store.find(name, param="prompt[0].image_id")
    assert (found.id, found.digest, found.kind) == (name, source_digest(RED, "image"), "image")
    assert not found.is_at_hand
    assert found.data == RED
    store.delete(name)
    with pytest.raises(MediaNotFound) as caught:
        _ = found.data
    assert caught.value.param == "prompt[0].image_id"


@pytest.mark.parametrize(
    "name", ["", "img_", "img_" + "0" * 64, "img_" + "A" * 64, "img_../../../etc/passwd", "img_" + "0" * 64 + "\n"]
)
def test_what_is_not_there_is_not_found(store: MediaStore, name: str) -> None:
    store.put(RED, "image")
    assert not store.exists(name)
    for look in (store.get, store.find, store.describe, store.size, store.delete):
        with pytest.raises(MediaNotFound, match="there is no media"):
            look(name)


def test_names_come_in_their_order_from_any_place(store: MediaStore) -> None:
    names = put_many(store, 60)
    assert list(store.names()) == names
    for place in (0, 17, 59):
        assert list(store.names(after=names[place])) == names[place + 1 :]
    images = [name for name in names if name.startswith("img_")]
    assert list(store.names("image")) == images
    assert list(store.names("video")) == [name for name in names if name not in images]
    assert list(store.names("image", after=images[3])) == images[4:]
    store.delete(names[0])
    assert list(store.names()) == names[1:]


def test_an_empty_store_is_no_error(store: MediaStore) -> None:
    assert list(store.names()) == []
    assert not store.exists("img_" + "0" * 64)
    store.sweep()


def test_two_stores_of_one_place_see_the_same(tmp_path: Path) -> None:
    one, other = MediaStore(str(tmp_path)), MediaStore(str(tmp_path))
    assert list(other.names()) == []
    name = one.put(RED, "image")
    assert list(other.names()) == [name]
    other.delete(name)
    assert list(one.names()) == []


def test_a_damaged_file_counts_as_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MediaStore(str(tmp_path))
    name = store.put(RED, "image")
    file = tmp_path / name[:6] / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MediaNotFound):
        store.get(name)
    assert "damaged" in caplog.text
    store.delete(name)
    assert store.get(store.put(RED, "image")).data == RED


def test_a_disk_that_does_not_work_is_told_without_paths(tmp_path: Path) -> None:
    (tmp_path / "media").write_bytes(b"a file where a folder should be")
    store = MediaStore(str(tmp_path / "media"))
    with pytest.raises(StorageUnavailable) as caught:
        store.put(RED, "image")
    assert str(tmp_path) not in caught.value.message


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    store = MediaStore(str(tmp_path))
    monkeypatch.setattr("server.media.store.os.fsync", full)
    with pytest.raises(StorageUnavailable):
        store.put(RED, "image")
    assert list(store.names()) == []
    assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_what_killed_writers_left_goes_once_it_is_old(tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    name = store.put(RED, "image")
    old, new = (tmp_path / UNFINISHED / name for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - UNFINISHED_SECONDS - 1))
    store.sweep()
    assert (old.exists(), new.exists()) == (False, True)
    assert list(store.names()) == [name]


# writes media of a few hundred kilobytes until it is killed; their bytes follow from their number
WRITER = """
import random, sys
from server.media.store import MediaStore

store, seed = MediaStore(sys.argv[1]), int(sys.argv[2])
for i in range(10**6):
    store.put(random.Random(seed * 10**6 + i).randbytes(300_000), "image")
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_no_half_media(tmp_path: Path) -> None:
    store, acknowledged, luck = MediaStore(str(tmp_path / "media")), set[str](), random.Random(0)
    for seed in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "media"), str(seed)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(luck.random() * 0.05)
            process.kill()
            told = 1 + len(process.stdout.read().splitlines())
        acknowledged |= {
            f"img_{source_digest(random.Random(seed * 10**6 + i).randbytes(300_000), 'image').hex()}"
            for i in range(told)
        }
    names = set(store.names())
    assert acknowledged <= names
    for name in names:  # each is whole, also those that were written and not acknowledged
        assert store.get(name).id == name
    # and the killing came while something was being written
    assert list((tmp_path / "media" / UNFINISHED).iterdir())
