"""The archive of an import arrives in a file on the disk, which stays until the import ends or its client leaves."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.media.source import EncodedMedia
from server.media.turns import Job
from tests.server.api.routes.test_archives import EXAMPLE, FILES, IMPORT, imported, num_stored, refused
from tests.server.archives import archive
from tests.server.fakes import eventually

pytestmark = pytest.mark.anyio


class Upload:
    """An import on the ASGI interface, whose client can send piece by piece, and disconnect."""

    def __init__(self, app: FastAPI, client: str = "10.0.0.9") -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": IMPORT,
            "raw_path": IMPORT.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/zip")],
            "client": (client, 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self.messages.get, self._send))

    def send(self, data: bytes, *, is_last: bool = False) -> None:
        self.messages.put_nowait({"type": "http.request", "body": data, "more_body": not is_last})

    def disconnect(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def error(self) -> tuple[int, str]:
        await asyncio.wait_for(self.task, 20)
        body = b"".join(message.get("body", b"") for message in self.sent)
        return self.sent[0]["status"], json.loads(body)["error"]["code"]


@pytest.mark.parametrize("is_whole", [False, True], ids=["arriving", "decoding"])
async def test_an_import_ends_with_its_client(
    app: FastAPI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    async def decode(media: EncodedMedia, job: Job) -> None:
        started.set()
        await asyncio.sleep(60)

    started = asyncio.Event()
    monkeypatch.setattr(app.state.services.decoder, "decode", decode)
    upload = Upload(app)
    if is_whole:
        upload.send(archive([EXAMPLE], FILES), is_last=True)
        await asyncio.wait_for(started.wait(), 20)
    else:
        upload.send(b"PK")
        await eventually(lambda: app.state.services.imports.used == 1)
    upload.disconnect()
    await asyncio.wait_for(upload.task, 20)
    assert app.state.services.imports.used == 0
    assert await num_stored(http) == (0, 0)


async def test_few_archives_arrive_at_once(app: FastAPI, http: httpx.AsyncClient) -> None:
    """They take disk space while they arrive, which may be for long."""
    imports = app.state.services.imports
    uploads = [Upload(app, "10.0.0.1") for _ in range(3)]
    await eventually(lambda: imports.used == 3)
    assert await Upload(app, "10.0.0.1").error() == (429, "client_over_share")
    uploads.append(Upload(app, "10.0.0.2"))
    await eventually(lambda: imports.used == 4)
    assert await Upload(app, "10.0.0.3").error() == (503, "overloaded")
    for upload in uploads:
        upload.disconnect()
        await upload.task
    assert imports.used == 0
    await imported(http, archive([]))


async def test_the_file_of_an_import_is_closed_by_a_thread(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To free the space of a large file takes long."""

    class File(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                threads.append(threading.get_ident())
            super().close()

    threads: list[int] = []
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: File(tmp_path / "file", "w+"))
    await imported(http, archive([]))
    await refused(http, b"no archive")
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_a_disk_that_is_full_until_the_file_is_closed_is_reported(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class File(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: io.BufferedRandom(File(tmp_path / "file", "w+")))
    assert await refused(http, archive([])) == (503, "storage_unavailable", None)


async def test_a_full_disk_is_reported(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert await refused(http, archive([])) == (503, "storage_unavailable", None)
