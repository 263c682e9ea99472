"""Tests of the completion of set names, as a shell calls it: a process with the words of the command line."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread

import pytest

from flamboyance_client import Client
from tests.clients.python.cli.commands import PACKAGE
from tests.clients.serving import KEY

NAMES = ["complete-cats", "complete-dogs"]
NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture(scope="module", autouse=True)
def sets(url: str) -> Iterator[None]:
    with Client(url, api_key=KEY) as client:
        for name in (*NAMES, "other"):
            client.support_sets.create(name=name, examples=[])
        yield
        for name in (*NAMES, "other"):
            client.support_sets.delete(name)


def completed(line: str, *command: str) -> list[str]:
    """Return what bash would offer for the last word of a line; the completion writes nothing to stderr."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "PYTHONPATH": str(PACKAGE / "src")}
    variables[f"_{words[0].upper().replace('-', '_')}_COMPLETE"] = "complete_bash"
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    "line",
    [
        "support-set show complete-",
        "support-set evaluations complete-",
        "support-set delete other complete-",
        "classify --support-set complete-",
        "ask -s complete-",
    ],
)
def test_names_that_begin_with_the_word_are_offered(line: str) -> None:
    assert completed(f"flamboyance-client {line}", "flamboyance_client") == NAMES


def test_an_empty_word_offers_all_names() -> None:
    assert {*NAMES, "other"} <= set(completed("flamboyance-client support-set show ", "flamboyance_client"))


def test_the_command_of_the_application_offers_them_too() -> None:
    assert completed("flamboyance support-set show complete-c", "flamboyance") == NAMES[:1]


def test_the_server_is_that_of_the_command_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_URL", NO_SERVER)
    line = "flamboyance-client support-set show {} complete-d"
    assert completed(line.format(f"--url {url}"), "flamboyance_client") == NAMES[1:]
    assert completed(line.format(""), "flamboyance_client") == []


def test_a_key_that_is_refused_leaves_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_API_KEY", "wrong")
    assert completed("flamboyance-client support-set show complete-", "flamboyance_client") == []


def test_a_server_that_does_not_answer_leaves_no_names() -> None:
    """The client itself would wait ten minutes for the answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert completed(f"flamboyance-client support-set show --url {url} complete-", "flamboyance_client") == []


def test_a_server_that_answers_slowly_leaves_no_names() -> None:
    """Each read is fast enough for a timeout of the client."""
    sent = 0

    def drip(server: socket.socket) -> None:
        nonlocal sent
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n")
            for _ in range(100):
                connection.sendall(b" ")
                sent += 1
                time.sleep(0.2)

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=drip, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert completed(f"flamboyance-client support-set show --url {url} complete-", "flamboyance_client") == []
        assert 0 < sent < 100
