"""Tests of files that the client sends and receives, with fake servers and between two real ones."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    NotFound,
    Retries,
    SupportSet,
    TransportError,
    Unavailable,
    UnexpectedReply,
    example,
    query,
)
from flamboyance_client.transfers import PIECE_BYTES, archive_path
from tests.clients.serving import KEY, tiny_server

COLOURS = ("red", "green", "blue")
SET = {"id": "ss_1", "name": "pets", "version": 1, "num_examples": 3}
MEDIA = {"id": "img_1", "object": "image", "bytes": 9, "width": 2, "height": 1, "frames": 1}
COMPLETION = {"id": "cmpl-1", "model": "tiny", "choices": [{"index": 0, "text": "cat"}]}
ARCHIVE = b"PK and more"
STREAM = f"data: {json.dumps(COMPLETION)}\n\ndata: [DONE]\n\n"


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 7), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key=KEY, retries=Retries(limit=0)) as client:
        examples = [example(png(colour), f"It is {colour}.", label=colour, id=colour) for colour in COLOURS]
        client.support_sets.create(name="transferred", examples=examples, metadata={"of": "tests"}, exist_ok=True)
        yield client


@pytest.fixture(scope="module")
def other_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tiny_server(tmp_path_factory.mktemp("other")) as url:
        yield url


def classified(client: Client) -> list[tuple[str | None, dict[str, float], Any]]:
    nearest: Any = {"support_set": "transferred", "k": 2, "strategy": "rices_image"}
    results = [client.classify(query(png(colour)), examples=nearest) for colour in ("orange", "navy")]
    return [(result.label, dict(result.probabilities), result.fewshot["shots"]) for result in results]


def test_a_set_classifies_alike_on_another_server(client: Client, other_url: str, tmp_path: Path) -> None:
    path = client.support_sets.export("transferred", tmp_path)
    assert path == tmp_path / "transferred.zip"
    assert list(tmp_path.iterdir()) == [path]
    with Client(other_url, api_key=KEY, retries=Retries(limit=0)) as other:
        copy = other.support_sets.import_(path)
        assert (copy.name, copy.example_ids, copy.raw["metadata"]) == ("transferred", COLOURS, {"of": "tests"})
        for result, expected in zip(classified(other), classified(client), strict=True):
            assert (result[0], result[2]) == (expected[0], expected[2])
            assert result[1] == pytest.approx(expected[1], abs=1e-6)


def test_the_async_client_exports_and_imports(url: str, client: Client, tmp_path: Path) -> None:
    async def transfer() -> SupportSet:
        async with AsyncClient(url, api_key=KEY, retries=Retries(limit=0)) as asynchronous:
            path = await asynchronous.support_sets.export("transferred", tmp_path / "set.zip", version=1)
            return await asynchronous.support_sets.import_(path, name="transferred-again")

    copy = asyncio.run(transfer())
    assert (tmp_path / "set.zip").read_bytes() == client.support_sets.export("transferred", tmp_path).read_bytes()
    assert client.support_sets.get("transferred-again").id == copy.id
    assert client.support_sets.delete(copy.id)


def test_a_name_that_is_taken_may_exist(client: Client, tmp_path: Path) -> None:
    path = client.support_sets.export("transferred", tmp_path)
    with pytest.raises(Conflict):
        client.support_sets.import_(path)
    existing = client.support_sets.get("transferred")
    assert client.support_sets.import_(path, exist_ok=True).id == existing.id
    assert client.support_sets.import_(path, name="transferred", exist_ok=True).id == existing.id


def test_errors_are_those_of_the_server_and_leave_no_file(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        client.support_sets.export("nothing", tmp_path)
    (tmp_path / "not.zip").write_bytes(b"not a ZIP file")
    with pytest.raises(BadRequest) as caught:
        client.support_sets.import_(tmp_path / "not.zip", exist_ok=True)
    assert caught.value.code == "invalid_archive"
    with pytest.raises(FileNotFoundError):
        client.support_sets.import_(tmp_path / "missing.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["not.zip"]


class BrokenStream(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"PK"
        raise httpx.RemoteProtocolError("the connection was closed")


def test_a_download_that_ends_early_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=BrokenStream()))
    (tmp_path / "pets.zip").write_bytes(b"an earlier one")
    with Client("http://server", transport=transport) as client, pytest.raises(TransportError):
        client.support_sets.export("pets", tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("pets.zip", b"an earlier one")]


def archive(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, content=ARCHIVE)


@pytest.mark.parametrize("content", [b"<html>log in</html>", b"", b"P", b"Px"])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_no_archive_is_not_saved(content: bytes, is_async: bool, tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))

    async def export_async() -> None:
        async with AsyncClient("http://server", transport=transport) as client:
            await client.support_sets.export("pets", tmp_path)

    def export() -> None:
        with Client("http://server", transport=transport) as client:
            client.support_sets.export("pets", tmp_path)

    with pytest.raises(UnexpectedReply, match="expected an archive"):
        asyncio.run(export_async()) if is_async else export()
    assert not [*tmp_path.iterdir()]


def test_a_process_without_stderr_exports_and_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        return archive(request) if request.method == "GET" else httpx.Response(200, json=SET)

    monkeypatch.setattr("sys.stderr", None)
    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        path = client.support_sets.export("pets", tmp_path)
        assert client.support_sets.import_(path).name == "pets"


def test_two_exports_to_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    both_have_begun = threading.Barrier(2)

    class Slow(httpx.SyncByteStream):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def __iter__(self) -> Iterator[bytes]:
            for start in (0, 2):
                both_have_begun.wait(10)
                yield self._content[start : start + 2]

    contents = [b"PKab", b"PKyz"]
    remaining = iter(contents)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Slow(next(remaining))))
    (tmp_path / "pets.zip.part").write_bytes(b"of the user")
    with Client("http://server", transport=transport) as client, ThreadPoolExecutor() as threads:
        for path in threads.map(lambda _: client.support_sets.export("pets", tmp_path / "pets.zip"), contents):
            assert path.read_bytes() in contents
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets.zip", "pets.zip.part"]
    assert (tmp_path / "pets.zip.part").read_bytes() == b"of the user"


def test_an_export_is_written_into_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # neither end waits for the other
    with Client("http://server", transport=httpx.MockTransport(archive)) as client:
        client.support_sets.export("pets", pipe)
    assert pipe.is_fifo()
    assert os.read(reader, 100) == ARCHIVE
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


def test_an_export_replaces_the_file_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "1.zip").write_bytes(b"an earlier one")
    for name, target in (("pets.zip", "1.zip"), ("new.zip", "2.zip")):
        (link := tmp_path / name).symlink_to(Path("files") / target)
        with Client("http://server", transport=httpx.MockTransport(archive)) as client:
            client.support_sets.export("pets", link)
        assert link.is_symlink()
        assert (tmp_path / "files" / target).read_bytes() == ARCHIVE
    assert len(list((tmp_path / "files").iterdir())) == 2


def test_an_error_names_the_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with Client("http://server", transport=httpx.MockTransport(archive)) as client:
        with pytest.raises(FileNotFoundError) as caught:
            client.support_sets.export("pets", tmp_path / "nowhere" / "pets.zip")
        assert caught.value.filename == str(tmp_path / "nowhere")
        (tmp_path / "pets.zip").mkdir()
        (tmp_path / "pets.zip" / "pets.zip").mkdir()
        with pytest.raises(IsADirectoryError) as refused:
            client.support_sets.export("pets", tmp_path / "pets.zip")
        assert refused.value.filename == str(tmp_path / "pets.zip" / "pets.zip")


def sent(status: int, path: Path, is_async: bool) -> list[httpx.Request]:
    """Return the requests of an import to which a server gives this status."""
    requests: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(status, json=SET, headers={"retry-after": "0"})

    def handle(request: httpx.Request) -> httpx.Response:
        request.read()
        return reply(request)

    async def handle_async(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return reply(request)

    async def run() -> None:
        async with AsyncClient("http://server", transport=httpx.MockTransport(handle_async)) as client:
            await client.support_sets.import_(path, name="pets")

    def run_blocking() -> None:
        with Client("http://server", transport=httpx.MockTransport(handle)) as client:
            client.support_sets.import_(path, name="pets")

    def call() -> None:
        asyncio.run(run()) if is_async else run_blocking()

    if status == 200:
        call()
    else:
        with pytest.raises(Unavailable):
            call()
    return requests


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])
def test_a_file_is_sent_in_pieces_and_whole_again_after_an_error(tmp_path: Path, is_async: bool) -> None:
    content = bytes(range(256)) * (PIECE_BYTES // 100)
    path = tmp_path / "set.zip"
    path.write_bytes(content)
    (request,) = sent(200, path, is_async)
    assert (request.method, request.url.path, request.url.query) == ("POST", "/v1/support_sets/import", b"name=pets")
    assert request.content == content
    assert request.headers["content-length"] == str(len(content))
    assert request.headers["content-type"] == "application/zip"
    attempts = sent(503, path, is_async)
    assert [attempt.content for attempt in attempts] == [content] * 3
    assert len({attempt.headers["idempotency-key"] for attempt in attempts}) == 1


def test_a_pipe_is_sent_once_without_a_length(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(path.write_bytes, ARCHIVE)
        (attempt,) = sent(503, path, is_async=False)
        assert written.result() == len(attempt.content) == len(ARCHIVE)
    assert "content-length" not in attempt.headers


@pytest.mark.parametrize("size", [len(ARCHIVE) - 1, len(ARCHIVE) + 1])
@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])
def test_a_file_that_changes_its_size_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, is_async: bool
) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(ARCHIVE)
    monkeypatch.setattr("flamboyance_client.connection.size_of", lambda path: size)
    with pytest.raises(OSError, match=r"set\.zip has changed while it was sent"):
        sent(200, path, is_async)


def test_names_with_a_colon_have_files_of_their_own(tmp_path: Path) -> None:
    assert archive_path(tmp_path, "a:b") == tmp_path / "a%3Ab.zip"
    assert archive_path(tmp_path, "a_b") == tmp_path / "a_b.zip"


@pytest.mark.parametrize("content", [b"no ZIP", b"{}"])
def test_a_conflict_stays_one_if_the_file_has_no_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.zip"
    if content == b"{}":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("manifest.json", json.dumps({}))
    else:
        path.write_bytes(content)
    body = {"error": {"message": "taken", "code": "name_taken"}}
    transport = httpx.MockTransport(lambda request: httpx.Response(409, json=body))
    with Client("http://server", transport=transport) as client, pytest.raises(Conflict):
        client.support_sets.import_(path, exist_ok=True)


async def _send_files(client: AsyncClient, path: Path) -> None:
    await client.images.upload(path)
    await client.support_sets.search("pets", path)
    async with client.fewshot.stream(path) as events:
        assert [event.text async for event in events] == ["cat"]


def test_the_async_client_reads_files_in_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/completions"):
            return httpx.Response(200, text=STREAM)
        return httpx.Response(200, json={**MEDIA, "data": []})

    def read(path: Path) -> bytes:
        threads.append(threading.current_thread())
        return png("red")

    threads: list[threading.Thread] = []
    monkeypatch.setattr(Path, "read_bytes", read)

    async def run() -> None:
        async with AsyncClient("http://server", transport=httpx.MockTransport(handle)) as client:
            await _send_files(client, tmp_path / "a.png")

    asyncio.run(run())
    assert len(threads) == 3
    assert threading.current_thread() not in threads
