"""Tests of what processes of the command line write to stdout: an archive, and output for which the disk has no room."""

from __future__ import annotations

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
ARCHIVE = b"PK and more"


class Exports(BaseHTTPRequestHandler):
    """Answers every request with an archive."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(ARCHIVE)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Exports) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def process(module: str, *arguments: str, stdout: int | IO[Any] = subprocess.PIPE) -> tuple[int, bytes, str]:
    """Return the exit status of a process, and what it writes to stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients' / 'python' / 'src'}"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode()


def test_an_export_to_stdout_is_the_archive_alone(server: str) -> None:
    command = ("support-set", "export", "pets", "/dev/fd/1", "--force", "--url", server)
    assert process("flamboyance_client", *command) == (0, ARCHIVE, "")
