"""A real server in its own process, and a closed loop of HTTP clients that loads it.

The clients are threads with connections of the standard library, because they run on the server's machine and must cost
little.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from bench.driver import BenchFailed
from bench.table import ROOT
from bench.workload import Prompt
from server.settings import Settings

HOST = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 15.0
REQUEST_SECONDS = 600.0
DONE = b"data: [DONE]"


class HttpDriver:
    """The counterpart of `bench.driver.Driver` for a server at a port."""

    def __init__(self, port: int) -> None:
        self.port = port

    def run(self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int) -> float:
        """Stream all answers, and return the seconds until the last one is complete."""
        bodies = [_body(prompt, max_tokens) for prompt in prompts]
        shares = [bodies[client::concurrency] for client in range(concurrency)]
        failures: list[Exception] = []
        clients = [threading.Thread(target=self._run_client, args=(share, max_tokens, failures)) for share in shares]
        began = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        if failures:
            raise failures[0]
        return time.perf_counter() - began

    def _run_client(self, bodies: Sequence[bytes], max_tokens: int, failures: list[Exception]) -> None:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_SECONDS)
        try:
            for body in bodies:
                _complete(connection, body, max_tokens)
        except (OSError, http.client.HTTPException, BenchFailed) as error:
            failures.append(error)
        finally:
            connection.close()

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _body(prompt: Prompt, max_tokens: int) -> bytes:
    fields = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"prompt": prompt.parts(), **fields, **streamed}).encode()


def _complete(connection: http.client.HTTPConnection, body: bytes, max_tokens: int) -> None:
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise BenchFailed(f"the server responded with status {response.status}: {response.read().decode()}")
    lines = [line for line in response.read().split(b"\n") if line.startswith(b"data: ")]
    if not lines or lines[-1].strip() != DONE:
        raise BenchFailed(f"the stream ended with {lines[-1:]}")
    usage = json.loads(lines[-2].removeprefix(b"data: "))["usage"]
    if usage["completion_tokens"] != max_tokens:
        raise BenchFailed(f"the answer has {usage['completion_tokens']} tokens, expected {max_tokens}")


@contextmanager
def serving(settings: Settings, root: Path = ROOT) -> Iterator[HttpDriver]:
    """Run `python -m server` of a checkout with exactly these settings until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        port, log = free_port(), Path(folder) / "server.log"
        server = start_server(settings, port, Path(folder), root=root)
        exit_on_sigterm()
        try:
            yield _wait_until_ready(server, HttpDriver(port), log)
        finally:
            stop_server(server)


def exit_on_sigterm() -> None:
    """Make SIGTERM exit the benchmark normally, so that it also stops its server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def start_server(
    settings: Settings, port: int, folder: Path, environment: Mapping[str, str] | None = None, root: Path = ROOT
) -> subprocess.Popen[bytes]:
    """Start `python -m server` of a checkout at a port, without waiting for it. Settings, log and data are in a folder."""
    file = folder / "settings.yaml"
    defaults = {"data_dir": str(folder / "data")}
    values = {**defaults, **settings.model_dump(mode="json", exclude_defaults=True), "host": HOST, "port": port}
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "server", "--config", str(file)]
    with (folder / "server.log").open("a") as log:
        return subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env=environment)


def _wait_until_ready(server: subprocess.Popen[bytes], driver: HttpDriver, log: Path) -> HttpDriver:
    end = time.monotonic() + START_SECONDS
    while not driver.is_ready():
        if server.poll() is not None or time.monotonic() > end:
            raise BenchFailed(f"the server is not ready (exit status {server.poll()}):\n{log.read_text()}")
        time.sleep(0.2)
    return driver


def stop_server(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
