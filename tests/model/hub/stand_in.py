"""A Hugging Face Hub on this machine: the part of its HTTP interface that huggingface_hub uses to download models.

A repository has a folder per commit, and branches; it may be gated or private. The connection can be cut in the middle of a
file. All requests are recorded. Gated repositories show their description and refuse their files, as on the real Hub.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

TOKEN = "hf_of_a_reader"
LARGE = {".safetensors", ".bin", ".pt"}
CHUNK = 16 * 1024
GRACEFUL_SECONDS = 5


@dataclass
class Published:
    """A repository: the folder of each commit, and the commit of each branch or tag."""

    commits: dict[str, Path]
    revisions: dict[str, str]
    is_gated: bool = False
    is_private: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


class Refused(Exception):
    """A request that is answered with an error, as the real Hub describes it in headers."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


@dataclass
class StandIn:
    repositories: dict[str, Published] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    # the files whose next transfer ends after so many bytes
    cuts: dict[str, int] = field(default_factory=dict)
    # the files that never arrive
    dead: set[str] = field(default_factory=set)
    # the ranges that were requested, by file
    ranges: list[tuple[str, str]] = field(default_factory=list)
    is_down: bool = False
    url: str = ""

    def reset(self) -> None:
        """Forget the repositories and the requests."""
        for collection in (self.repositories, self.requests, self.cuts, self.dead, self.ranges):
            collection.clear()
        self.is_down = False

    def publish(self, name: str, folder: Path, *, branch: str = "main", **flags: bool) -> str:
        """Add a commit with the files of the folder, move the branch to it, and return its hash."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        published = self.repositories.setdefault(name, Published({}, {}, **flags))
        published.commits[commit] = folder
        published.revisions[branch] = commit
        return commit

    def files(self) -> list[str]:
        """Return the files that were requested, without their repositories."""
        return [
            request.rpartition("/")[2]
            for request in self.requests
            if request.startswith("GET") and "/resolve/" in request
        ]

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def record(request: Request, call_next: Any) -> Response:
            self.requests.append(f"{request.method} {request.url.path}")
            if self.is_down:
                return Response(status_code=503)
            answer: Response = await call_next(request)
            return answer

        @app.exception_handler(Refused)
        async def refuse(request: Request, refused: Refused) -> Response:
            return JSONResponse(refused.headers, refused.status, {k: v for k, v in refused.headers.items() if v})

        @app.get("/api/models/{owner}/{name}")
        @app.get("/api/models/{owner}/{name}/revision/{revision:path}")
        async def info(owner: str, name: str, request: Request, revision: str = "main") -> dict[str, Any]:
            published, commit = self.open(f"{owner}/{name}", revision, request)
            return {
                "id": f"{owner}/{name}",
                "sha": commit,
                "private": published.is_private,
                "gated": "manual" if published.is_gated else False,
                "siblings": [{"rfilename": path.name} for path in sorted(published.commits[commit].iterdir())],
            }

        @app.get("/api/models/{owner}/{name}/tree/{revision:path}")
        async def tree(owner: str, name: str, revision: str, request: Request) -> list[dict[str, Any]]:
            published, commit = self.open(f"{owner}/{name}", revision, request)
            return [entry(path) for path in sorted(published.commits[commit].iterdir())]

        @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["HEAD", "GET"])
        async def resolve(owner: str, name: str, revision: str, path: str, request: Request) -> Response:
            published, commit = self.open(f"{owner}/{name}", revision, request)
            if published.is_gated and not has_token(request):
                raise Refused(401, "GatedRepo")
            file = published.commits[commit] / path
            if not file.is_file():
                raise Refused(404, "EntryNotFound")
            return self.send(file, commit, request)

        return app

    def open(self, name: str, revision: str, request: Request) -> tuple[Published, str]:
        published = self.repositories.get(name)
        if request.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if published is None or (published.is_private and not has_token(request)):
            raise Refused(404 if has_token(request) else 401, "RepoNotFound")
        commit = published.commit(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        return published, commit

    def send(self, file: Path, commit: str, request: Request) -> Response:
        size = file.stat().st_size
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(size)})
        start = 0
        if requested := request.headers.get("Range"):
            self.ranges.append((file.name, requested))
            start = int(requested.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        headers["Content-Length"] = str(size - start)
        end = start if file.name in self.dead else min(size, start + self.cuts.pop(file.name, size))
        return StreamingResponse(part(file, start, end), 206 if requested else 200, headers)


def has_token(request: Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {TOKEN}"


def entry(path: Path) -> dict[str, Any]:
    description = {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path)}
    if path.suffix in LARGE:
        description["lfs"] = {"oid": etag(path), "size": path.stat().st_size, "pointerSize": 100}
    return description


def etag(path: Path) -> str:
    return hashlib.new("sha256" if path.suffix in LARGE else "sha1", path.read_bytes()).hexdigest()


async def part(file: Path, start: int, end: int) -> AsyncIterator[bytes]:
    """Yield the bytes; where fewer come than the head of the answer promised, uvicorn closes the connection."""
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end:
            chunk = stream.read(min(CHUNK, end - start))
            start += len(chunk)
            yield chunk


@contextmanager
def running() -> Iterator[StandIn]:
    hub = StandIn()
    # a connection that a client never reads keeps uvicorn open without a limit
    config = uvicorn.Config(
        hub.app(), port=0, log_level="critical", access_log=False, timeout_graceful_shutdown=GRACEFUL_SECONDS
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        (socket,) = server.servers[0].sockets
        hub.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        yield hub
    finally:
        server.should_exit = True
        thread.join(2 * GRACEFUL_SECONDS)
        assert not thread.is_alive(), "the stand-in hub does not end"
