"""Tests of a client that is used in a process and in the child that it forks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.clients.python import forking


class PortAsModel(BaseHTTPRequestHandler):
    """Answers every request with the port of the connection that it came by, as the id of a model."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": str(self.client_address[1])}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), PortAsModel) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_forked_process_has_connections_of_its_own(url: str, kind: str) -> None:
    command = [sys.executable, "-m", forking.__name__, kind, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, *child, again, closed = done.stdout.split()
    assert child == [child[0]] * 2
    assert child[0] != first, "the child has used a connection of its parent"
    assert again == first, "the child has changed the connection of its parent"
    assert closed == "RuntimeError"
