"""Tests of what processes of the command line write to stdout: an archive, and output for which the disk has no room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients' / 'python' / 'src'}"}
ARCHIVE = b"PK and more"
SET = {
    "id": "ss_1",
    "name": "pets",
    "version": 1,
    "num_examples": 0,
    "num_media": 0,
    "created_at": 0,
    "status": "ready",
}
SUGGESTIONS = {"data": [{"index": 1, "labels": [], "reason": {}}], "known": [{"index": 0, "example": "cat-1"}]}


class Sets(BaseHTTPRequestHandler):
    """Answers requests about sets."""

    def do_GET(self) -> None:
        is_export = self.path.endswith("/export")
        self.reply(ARCHIVE if is_export else json.dumps({"data": [SET], "has_more": False}).encode())

    def do_DELETE(self) -> None:
        self.reply(b'{"deleted": true}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.reply(json.dumps(SUGGESTIONS).encode())

    def reply(self, content: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Sets) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def process(module: str, *arguments: str, stdout: int | IO[Any] = subprocess.PIPE) -> tuple[int, bytes, str]:
    """Return the exit status of a process, and what it writes to stdout and stderr."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=stdout, stderr=subprocess.PIPE, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode()


def test_an_export_to_stdout_is_the_archive_alone(server: str) -> None:
    command = ("support-set", "export", "pets", "/dev/fd/1", "--force", "--url", server)
    assert process("flamboyance_client", *command) == (0, ARCHIVE, "")


@pytest.mark.parametrize("module", ["flamboyance_client", "flamboyance"])
@pytest.mark.parametrize("command", [("support-set", "list"), ("support-set", "list", "--json"), ("--version",)])
def test_a_full_disk_is_one_line(server: str, module: str, command: tuple[str, ...]) -> None:
    if command[0] == "support-set":
        command = (*command, "--url", server)
    with Path("/dev/full").open("wb") as full:
        status, _, errors = process(module, *command, stdout=full)
    assert (status, errors) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("module", ["flamboyance_client", "flamboyance"])
@pytest.mark.parametrize("command", ["support-set delete pets", "support-set show .."])
def test_closed_streams_are_no_error(server: str, module: str, command: str) -> None:
    expected = 1 if ".." in command else 0
    for closed in ("<&- >&-", "<&- >&- 2>&-"):
        line = f"{sys.executable} -m {module} {command} --url {server} {closed}"
        done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert (done.returncode, "Traceback" in done.stderr) == (expected, False), done.stderr


def test_the_images_that_a_set_knows_have_lines(server: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    command = ("support-set", "suggest", "pets", str(tmp_path), "--json", "--url", server)
    status, output, _ = process("flamboyance_client", *command)
    assert (status, [json.loads(line) for line in output.splitlines()]) == (
        0,
        [
            {"image": str(tmp_path / "b.png"), **SUGGESTIONS["data"][0]},
            {"image": str(tmp_path / "a.png"), "index": 0, "example": "cat-1"},
        ],
    )
