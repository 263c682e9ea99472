"""Tests that a folder becomes a support set: the same one when it is uploaded again, and new versions when it changes."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from flamboyance_client import (
    AsyncClient,
    BadRequest,
    Client,
    Conflict,
    Retries,
    SupportSet,
    example,
    stored,
    uploads,
)
from flamboyance_client.errors import Refusal
from flamboyance_client.folders import labelled_files
from flamboyance_client.labelled import Unreadable, with_ids
from flamboyance_client.records import SkippedFile
from tests.clients.python.test_frames import Frame
from tests.clients.serving import KEY
from tests.model.test_media import video

Upload = Callable[..., SupportSet]
COLOURS = {"warm/red": "red", "warm/orange": "orange", "cold/blue": "blue", "cold/green": "green", "cold/teal": "teal"}


def picture(colour: str, width: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 7), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """Yield a client, and delete the sets that the test leaves."""
    with Client(url, api_key=KEY, retries=Retries(limit=0)) as client:
        existing = {item.id for item in client.support_sets.list()}
        yield client
        for item in client.support_sets.list():
            if item.id not in existing:
                client.support_sets.delete(item.id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my colours"
    for name, colour in COLOURS.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(colour))
    return folder


@pytest.fixture(params=["sync", "async"])
def upload(request: pytest.FixtureRequest, url: str, client: Client) -> Upload:
    if request.param == "sync":
        return client.support_sets.from_folder

    def upload(*arguments: Any, **options: Any) -> SupportSet:
        async def run() -> SupportSet:
            async with AsyncClient(url, api_key=KEY, retries=Retries(limit=0)) as asynchronous:
                return await asynchronous.support_sets.from_folder(*arguments, **options)

        return asyncio.run(run())

    return upload


def test_a_folder_is_the_same_set_when_it_is_uploaded_again(upload: Upload, client: Client, folder: Path) -> None:
    first = upload(folder)
    assert (first.name, first.version, first.num_examples) == ("my-colours", 1, 5)
    assert first.raw["expires_at"] is None
    examples = list(client.support_sets.examples("my-colours"))
    assert [item.label for item in examples] == ["cold"] * 3 + ["warm"] * 2
    assert [item.id.partition(":")[0] for item in examples][:2] == ["cold-blue.png", "cold-green.png"]
    again = upload(str(folder))
    assert (again.id, again.version, again.raw["updated_at"]) == (first.id, 1, first.raw["updated_at"])


def test_only_changes_of_the_folder_are_sent(upload: Upload, client: Client, folder: Path) -> None:
    first = upload(folder)
    before = {item.id for item in client.support_sets.examples(first.id)}
    (folder / "warm" / "red.png").write_bytes(picture("darkred"))
    (folder / "cold" / "teal.png").unlink()
    (folder / "cold" / "green.png").rename(folder / "warm" / "green.png")
    (folder / "grey").mkdir()
    (folder / "grey" / "grey.png").write_bytes(picture("grey"))
    changed = upload(folder)
    assert (changed.id, changed.num_examples) == (first.id, 5)
    assert changed.raw["label_counts"] == {"cold": 1, "grey": 1, "warm": 3}
    examples = list(client.support_sets.examples(first.id))
    assert [item.id.partition(":")[0] for item in examples if item.id in before] == ["cold-blue.png", "warm-orange.png"]
    assert client.support_sets.get(first.id, version=1).num_examples == 5
    assert upload(folder).version == changed.version


def test_examples_that_no_upload_wrote_stay(upload: Upload, client: Client, folder: Path) -> None:
    first = upload(folder)
    hash_of_pixels = "0123456789abcdef"
    foreign = [example(folder / "cold" / "blue.png", label="grey", id=id) for id in ("a:b", hash_of_pixels, "grey.png")]
    client.support_sets.put(first.id, [*foreign, example(answer="no id")])
    assert upload(folder).num_removed == 0
    (folder / "cold" / "teal.png").unlink()
    changed = upload(folder)
    assert (changed.num_removed, changed.num_examples) == (1, 8)
    assert changed.raw["label_counts"] == {"cold": 2, "warm": 2, "grey": 3}


def test_a_label_that_was_changed_is_that_of_the_folder_again(upload: Upload, client: Client, folder: Path) -> None:
    first = upload(folder)
    before = [(item.id, item.label) for item in client.support_sets.examples(first.id)]
    client.support_sets.put(first.id, [example(folder / "cold" / "blue.png", label="red", id=before[0][0])])
    assert upload(folder).raw["label_counts"] == {"cold": 3, "warm": 2}
    assert [(item.id, item.label) for item in client.support_sets.examples(first.id)] == before
    client.support_sets.put(
        first.id, [example(folder / "cold" / "blue.png", label="cold", question="?", id=before[0][0])]
    )
    upload(folder)
    assert all(not item.question for item in client.support_sets.examples(first.id))


def test_rows_without_paths_are_removed_with_their_data(client: Client) -> None:
    frame = Frame(image=[picture("red"), picture("blue"), picture("blue")], label=["warm", "cold", "cold"])
    client.support_sets.from_dataframe(frame, name="pixels")
    smaller = Frame(image=[picture("red")], label=["warm"])
    changed = client.support_sets.from_dataframe(smaller, name="pixels")
    assert (changed.num_examples, changed.num_removed) == (1, 2)


def test_a_set_that_another_client_has_made_meanwhile_is_updated(
    upload: Upload, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = {item.id for item in client.support_sets.list()}
    with monkeypatch.context() as context:
        context.setattr(uploads, "_find", lambda *_, **__: found_nothing())
        first = upload(folder)
        (folder / "warm" / "red.png").unlink()
        second = upload(folder)
        with pytest.raises(Conflict, match="taken"):
            upload(folder, exist_ok=False)
    assert (second.id, second.num_examples) == (first.id, 4)
    assert {item.id for item in client.support_sets.list()} - earlier == {first.id}


def found_nothing() -> Iterator[Any]:
    """Return a generator that yields no call, and whose result is None."""
    yield from ()


def test_a_large_folder_is_sent_in_batches(
    upload: Upload, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "BATCH_EXAMPLES", 2)
    monkeypatch.setattr(stored, "LISTED_AT_ONCE", 2)
    monkeypatch.setattr(uploads, "REMOVED_AT_ONCE", 1)
    first = upload(folder, name="batches")
    assert (first.version, first.num_examples, first.name) == (3, 5, "batches")
    assert [item.label for item in client.support_sets.examples(first.id)] == ["cold"] * 3 + ["warm"] * 2
    assert upload(folder, name="batches").version == 3
    for name in ("blue", "teal"):
        (folder / "cold" / f"{name}.png").unlink()
    assert upload(folder, name="batches").num_examples == 3


def test_a_batch_has_a_limited_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = with_ids(labelled_files(folder))
    assert [len(batch.examples) for batch in uploads._batches(items, None)] == [5]
    size = max(len(str(item.example())) for item in items)
    monkeypatch.setattr(uploads, "BATCH_BYTES", 2 * size)
    assert [len(batch.examples) for batch in uploads._batches(items, None)] == [2, 2, 1]
    monkeypatch.setattr(uploads, "BATCH_BYTES", 1)
    assert [len(batch.examples) for batch in uploads._batches(items, None)] == [1] * 5


def test_a_broken_file_is_named_and_leaves_no_set(
    upload: Upload, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = len(client.support_sets.list())
    (folder / "warm" / "red.png").write_bytes(picture("red", 50)[:60])
    for number in (64, 2):
        monkeypatch.setattr(uploads, "BATCH_EXAMPLES", number)
        with pytest.raises(BadRequest) as caught:
            upload(folder)
        assert str(folder / "warm" / "red.png") in str(caught.value)
        assert caught.value.code == "invalid_media"
        assert len(client.support_sets.list()) == sets


DAMAGED = "image cannot be decoded: its data are damaged, or end early"


def damage(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(picture("red", 50)[:60])


@pytest.mark.parametrize("num_examples", [64, 2])
def test_unreadable_files_are_skipped_on_request(
    upload: Upload, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, num_examples: int
) -> None:
    """Also if they are all that a request would send, and in an update."""
    monkeypatch.setattr(uploads, "BATCH_EXAMPLES", num_examples)
    cold, warm = folder / "cold", folder / "warm"
    damage(cold / "blue.png", cold / "green.png", warm / "red.png")
    (warm / "notes.png").write_text("no image")
    sets = len(client.support_sets.list())
    created = upload(folder, skip_unreadable=True)
    assert len(client.support_sets.list()) == sets + 1
    assert [example.label for example in client.support_sets.examples(created.id)] == ["cold", "warm"]
    assert created.skipped == (
        *(SkippedFile(str(cold / name), DAMAGED) for name in ("blue.png", "green.png")),
        SkippedFile(str(warm / "notes.png"), "an unknown format"),
        SkippedFile(str(warm / "red.png"), DAMAGED),
    )
    (warm / "red.png").write_bytes(picture("red"))
    updated = upload(folder, skip_unreadable=True)
    assert (updated.num_examples, updated.num_removed, len(updated.skipped)) == (3, 0, 3)


def test_a_skipped_file_keeps_the_example_that_it_had(upload: Upload, client: Client, folder: Path) -> None:
    """A file may be unreadable for a while, or damaged since; a file that is gone is removed."""
    first = upload(folder)
    damage(folder / "warm" / "red.png")
    (folder / "warm" / "orange.png").write_bytes(b"")
    (folder / "cold" / "teal.png").unlink()
    updated = upload(folder, skip_unreadable=True)
    assert (updated.id, updated.num_examples, updated.num_removed) == (first.id, 4, 1)
    assert {Path(file.path).name for file in updated.skipped} == {"red.png", "orange.png"}
    (folder / "cold" / "green.png").unlink()
    (folder / "warm" / "red.png").write_bytes(picture("red", 30))
    updated = upload(folder, skip_unreadable=True)
    assert (updated.id, updated.num_examples) == (first.id, 3)
    assert [file.path for file in updated.skipped] == [str(folder / "warm" / "orange.png")]


def test_a_skipped_file_of_the_same_path_does_not_permit_the_update_of_another_set(
    upload: Upload, client: Client, folder: Path, tmp_path: Path
) -> None:
    first = upload(folder)
    other = tmp_path / "others" / folder.name
    shutil.copytree(folder, other)
    for path in other.glob("*/*.png"):
        path.write_bytes(picture("pink", 20))
    damage(other / "warm" / "red.png")
    with pytest.raises(Conflict, match="none of them is among these"):
        upload(other, skip_unreadable=True)
    assert client.support_sets.get(first.id).version == first.version


def test_media_that_only_together_exceed_a_limit_are_not_skipped(folder: Path) -> None:
    """A request has a limit of all its pixels, which single images do not reach."""
    calls, sent = stored.SupportSetCalls(), list[int]()
    items = with_ids(labelled_files(folder))
    batch = next(uploads._batches(items, None))
    refused: list[Unreadable] = []
    steps = uploads._try(calls, batch, items, refused)
    call, made = next(steps), SupportSet(id="ss_1", version=1)
    with suppress(StopIteration):
        while True:
            if call.method == "DELETE":
                call = steps.send(True)
                continue
            examples = json.loads(json.dumps(call.body))["examples"]
            sent.append(len(examples))
            too_many = BadRequest(Refusal(message="too many pixels", code="invalid_media", param="examples[1].image"))
            call = steps.throw(too_many) if len(examples) > 2 else steps.send(made)
    assert (sent, refused) == ([5, 2, 3, 1, 2], [])


def test_a_folder_of_unreadable_files_alone_is_an_error(upload: Upload, client: Client, folder: Path) -> None:
    sets = len(client.support_sets.list())
    damage(*folder.glob("*/*.png"))
    (folder / "warm" / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"can read none of these: .*blue.png \(image cannot be decoded.*notes.png"):
        upload(folder, skip_unreadable=True)
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as images or videos"):
        upload(folder, skip_unreadable=True)
    assert len(client.support_sets.list()) == sets


def test_a_set_may_be_refused_to_exist(upload: Upload, folder: Path) -> None:
    upload(folder, exist_ok=False)
    with pytest.raises(Conflict, match="the name 'my-colours' is taken by the support set ss_"):
        upload(folder, exist_ok=False)


def test_a_set_of_other_examples_is_not_replaced(upload: Upload, client: Client, folder: Path) -> None:
    other = client.support_sets.create(name="my-colours", examples=[example("img_0", label="a", id="b")][:0])
    assert upload(folder).id == other.id  # an empty set has nothing to lose
    for file in folder.rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(Conflict, match="has 5 examples, and none of them is among these") as caught:
        upload(folder)
    assert caught.value.code == "name_taken"
    assert str(caught.value).lower().count("choose another name") == 1
    assert client.support_sets.get("my-colours").version == 2


def test_a_process_without_stderr_uploads_a_folder(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert client.support_sets.from_folder(folder).num_examples == 5


def test_the_fields_of_the_set_are_set_each_time(upload: Upload, folder: Path) -> None:
    first = upload(folder, ttl_seconds=600, metadata={"a": 1})
    assert first.raw["metadata"] == {"a": 1}
    assert first.raw["expires_at"] - first.raw["created_at"] < 700
    again = upload(folder, ttl_seconds=6000)
    assert again.version == 1
    assert again.raw["expires_at"] > first.raw["expires_at"] + 5000
    assert again.raw["metadata"] == {"a": 1}
    with pytest.raises(TypeError, match="unknown option colour"):
        upload(folder, colour="red")


def test_a_name_that_no_set_can_have_is_refused(client: Client, tmp_path: Path) -> None:
    for name in ("...", "ss_1"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "1.png").write_bytes(picture("red"))
        with pytest.raises(ValueError, match="pass name="):
            client.support_sets.from_folder(tmp_path / name)
    assert client.support_sets.from_folder(tmp_path / "ss_1", name="ok").name == "ok"


def test_a_data_frame_is_a_set(url: str, client: Client, folder: Path) -> None:
    frame = Frame(image=[f"{name}.png" for name in COLOURS], label=[name.partition("/")[0] for name in COLOURS])
    first = client.support_sets.from_dataframe(frame, root=folder, name="frame")
    assert [item.label for item in client.support_sets.examples("frame")] == ["warm"] * 2 + ["cold"] * 3

    async def again() -> SupportSet:
        async with AsyncClient(url, api_key=KEY) as asynchronous:
            return await asynchronous.support_sets.from_dataframe(frame, root=folder, name="frame")

    assert (asyncio.run(again()).id, asyncio.run(again()).version) == (first.id, 1)
    unnamed = client.support_sets.from_dataframe(frame, root=folder)
    assert (unnamed.name, unnamed.num_examples) == (None, 5)
    assert client.support_sets.from_dataframe(frame, root=folder).id != unnamed.id


def test_a_set_that_another_client_changes_meanwhile_is_a_conflict(client: Client, folder: Path, url: str) -> None:
    first = client.support_sets.from_folder(folder)
    (folder / "warm" / "white.png").write_bytes(picture("white"))

    class Meanwhile(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "POST":
                client.support_sets.put(first.id, [{"text": "a"}])
            return super().handle_request(request)

    with Client(url, api_key=KEY, transport=Meanwhile()) as slow, pytest.raises(Conflict) as caught:
        slow.support_sets.from_folder(folder)
    assert caught.value.code == "version_conflict"


def test_previews_are_those_of_the_folder_or_are_downloaded(url: str, client: Client, folder: Path) -> None:
    uploaded = client.support_sets.from_folder(folder)
    assert [preview.label for preview in uploaded.previews] == ["cold"] * 3 + ["warm"] * 2
    assert "data:image/jpeg;base64" in uploaded._repr_html_()
    assert not client.support_sets.get("my-colours").previews
    downloaded = client.support_sets.preview("my-colours", limit=3)
    assert [preview.label for preview in downloaded.previews] == ["cold"] * 2 + ["warm"]
    assert downloaded == client.support_sets.get("my-colours")

    async def preview() -> SupportSet:
        async with AsyncClient(url, api_key=KEY) as asynchronous:
            return await asynchronous.support_sets.preview("my-colours", limit=3)

    assert asyncio.run(preview()).previews == downloaded.previews
    with pytest.raises(ValueError, match="limit must be 1 to 24, not 25"):
        client.support_sets.preview("my-colours", limit=25)


def test_a_video_is_an_example(client: Client, tmp_path: Path) -> None:
    (tmp_path / "clips" / "fade").mkdir(parents=True)
    (tmp_path / "clips" / "fade" / "1.MP4").write_bytes(video([0, 128, 255]))
    clips = client.support_sets.from_folder(tmp_path / "clips")
    (stored,) = client.support_sets.examples("clips")
    assert stored.raw["media"][0]["type"] == "video_id"
    assert "no image" in client.support_sets.preview(clips.id)._repr_html_()
