"""The index is that of pip, and versions are read from the names of files."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from packaging.version import Version

from deploy.supply import index


def test_the_index_is_the_one_that_pip_is_configured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://packindex.example/simple/")
    assert index.index_url() == "https://packindex.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    assert "://" in index.index_url()


class Index(BaseHTTPRequestHandler):
    """An index that knows every project."""

    def do_GET(self) -> None:
        assert self.headers["Accept"] == index.JSON
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"name": self.path.split("/")[2], "files": []}).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_projects_are_read_from_that_index_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"project-{n}" for n in range(20)]
    with HTTPServer(("127.0.0.1", 0), Index) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        projects = index.read_projects(names)
        server.shutdown()
    assert [project["name"] for project in projects] == names


@pytest.mark.parametrize(
    ("filename", "version"),
    [("a-1.0.tar.gz", Version("1.0")), ("a_b-2.0rc1-py3-none-any.whl", Version("2.0rc1")), ("a.zip", None)],
)
def test_the_version_of_a_file(filename: str, version: Version | None) -> None:
    assert index.version_of(filename) == version
