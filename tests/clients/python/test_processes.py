"""Tests of a client that is used in several processes, forked or not, and in several event loops."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from threading import Thread

import pytest

from flamboyance_client import AsyncClient, Client, Retries
from tests.clients.python import forking, looping


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


def test_an_async_client_is_used_in_one_event_loop_after_another(url: str) -> None:
    command = [sys.executable, "-m", looping.__name__, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    connections, closed = done.stdout.splitlines()
    *models, kept = connections.split()
    assert models[::2] == models[1::2], "a loop does not keep its connection"
    assert len(set(models)) == 3
    assert kept == "2", "the connections of closed loops are kept"
    assert closed == "Cannot send a request, as the client has been closed."


def test_a_client_is_sent_to_a_process_that_is_not_forked(url: str) -> None:
    client = Client(url, api_key="a key", model="tiny", retries=Retries(limit=0))
    client.models()
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_model, (client,)) != client.models()[0].id
    for kind in (Client, AsyncClient):
        client = pickle.loads(ForkingPickler.dumps(kind(url, api_key="a key", model="tiny")))
        assert type(client) is kind
        assert client._http.get().headers["authorization"] == "Bearer a key"
        assert client._api.model == "tiny"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pickle_that_may_be_stored_is_refused(kind: type[Client | AsyncClient]) -> None:
    with pytest.raises(
        TypeError, match=f"only multiprocessing can pickle a {kind.__name__}, because it has an API key"
    ):
        pickle.dumps(kind(api_key="a key"))


def first_model(client: Client) -> str:
    return client.models()[0].id
