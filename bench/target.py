"""A server under test in its own process and folder: requests to it, its child processes, its gauges and its restarts.

A request never raises: a connection that is refused, closed or silent gives an answer with status 0.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from bench.driver import BenchFailed
from bench.serving import HOST, exit_on_sigterm, free_port, start_server, stop_server
from server.settings import Settings
from server.telemetry.metrics import PREFIX
from server.wire import WORKER_MODULE

# long, because measuring weight formats takes long on a busy machine
START_SECONDS = 300.0
REQUEST_SECONDS = 60.0
# text that an answer to a client must not contain: an address in memory, a stack trace, a path of the server
LEAK = re.compile(rb"0x[0-9a-f]{6,}|Traceback \(most|File \\?\"/|site-packages")
JSON_HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str = "POST"
    path: str = "/v1/completions"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, or with status 0 the error instead of one."""

    status: int
    seconds: float
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def is_clear(self) -> bool:
        """A success, or a refusal that says why in the server's own words."""
        if 200 <= self.status < 300:
            return True
        is_refusal = 400 <= self.status < 500 or self.status in (503, 504)
        return is_refusal and self._names_its_error() and LEAK.search(self.body) is None

    def _names_its_error(self) -> bool:
        try:
            error = json.loads(self.body)["error"]
            is_named = bool(error["code"]) and bool(error["message"])
        except (ValueError, KeyError, TypeError):
            return False
        return is_named and (self.status != 503 or "retry-after" in self.headers)

    def json(self) -> Any:
        return json.loads(self.body)


def post(path: str, **fields: Any) -> Request:
    """Return a request with a JSON body."""
    return Request(path=path, body=json.dumps(fields).encode(), headers=JSON_HEADERS)


def get(path: str) -> Request:
    return Request(method="GET", path=path)


def text_request(max_tokens: int = 4, **fields: Any) -> Request:
    """Return a normal request."""
    defaults = {"prompt": "A flamingo is", "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return post("/v1/completions", **{**defaults, **fields})


def image_request(seed: int, max_tokens: int = 4, **fields: Any) -> Request:
    """Return a normal request with a small picture that the server has not seen."""
    parts = [image_part(jpeg(seed)), {"type": "text", "text": " A picture of"}]
    return text_request(max_tokens, prompt=parts, **fields)


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode()}}


def jpeg(seed: int, side: int = 64) -> bytes:
    """Return a picture of coloured squares."""
    colours = random.Random(seed).randbytes(3 * 8 * 8)
    file = io.BytesIO()
    Image.frombytes("RGB", (8, 8), colours).resize((side, side), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def exchange(connection: http.client.HTTPConnection, request: Request) -> Answer:
    """Send a request and read the whole answer."""
    began = time.perf_counter()
    try:
        connection.request(request.method, request.path, request.body or None, dict(request.headers))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        return Answer(status=0, seconds=time.perf_counter() - began, error=type(error).__name__)
    return Answer(status=response.status, seconds=time.perf_counter() - began, body=body, headers=headers)


def encoded(request: Request, host: str = HOST) -> bytes:
    """Return the bytes of a request, for connections that misbehave on purpose."""
    lines = [f"{request.method} {request.path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    lines += [f"Content-Length: {len(request.body)}", "", ""]
    return "\r\n".join(lines).encode() + request.body


class Target:
    """A server at a port. If its process is not known, only requests can be sent."""

    def __init__(self, port: int, host: str = HOST, process: psutil.Process | None = None) -> None:
        self.host = host
        self.port = port
        self._process = process

    def send(self, request: Request, *, timeout: float = REQUEST_SECONDS, source: str | None = None) -> Answer:
        """Send a request on its own connection, from the address `source`, and read the whole answer."""
        connection = self.connect(timeout, source)
        try:
            return exchange(connection, request)
        finally:
            connection.close()

    def connect(self, timeout: float, source: str | None = None) -> http.client.HTTPConnection:
        """Return a connection that opens with its first request."""
        address = None if source is None else (source, 0)
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout, source_address=address)

    def is_ready(self) -> bool:
        return self.send(get("/health/ready"), timeout=5).status == 200

    def worker_id(self) -> int | None:
        """Return the process id of the worker that last became ready."""
        answer = self.send(get("/version"), timeout=30)
        return answer.json()["engine"].get("pid") if answer.status == 200 else None

    def gauges(self) -> dict[str, float]:
        """Return the metrics without labels of their own, by name without prefix."""
        text = self.send(get("/metrics"), timeout=30).body.decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {
            sample.name.removeprefix(PREFIX): sample.value
            for sample in samples
            if sample.labels.keys() == {"model_name"}
        }

    @property
    def process(self) -> psutil.Process:
        if self._process is None:
            raise BenchFailed("this needs a server that the command has started itself")
        return self._process

    @property
    def has_process(self) -> bool:
        return self._process is not None

    def worker(self) -> psutil.Process:
        """Return the worker that last became ready, which is not the spare one."""
        pid = self.worker_id()
        if pid is None:
            raise BenchFailed("the server does not name its worker")
        return psutil.Process(pid)

    def spares(self) -> list[psutil.Process]:
        """Return the processes that wait to take the worker's place."""
        worker = self.worker_id()
        return [process for process in self._children(WORKER_MODULE) if process.pid != worker]

    def decoders(self) -> list[psutil.Process]:
        return self._children("server.media.decoder")

    def trials(self) -> list[psutil.Process]:
        """Return the process that compiles each grammar before the worker does, once the worker has started it."""
        return self._children("server.grammar.trial")

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def _children(self, module: str) -> list[psutil.Process]:
        return [child for child in self.process.children(recursive=True) if module in command_of(child)]

    def resident_mb(self) -> float:
        """Return the memory of the API process."""
        return self.process.memory_info().rss / 2**20 if self.has_process else 0.0


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; nothing for one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # which a zombie raises, too
        return []


class Server:
    """Settings and a folder that outlive the process: the same data are served again after a kill."""

    def __init__(self, settings: Settings, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        values = {"data_dir": folder / "data", **settings.model_dump(exclude_unset=True)}
        self.settings = Settings.model_validate(values)
        self.folder = folder
        self.port = free_port()
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Target:
        """Start the server and wait until it is ready."""
        self._process = start_server(self.settings, self.port, self.folder, self._environment)
        target = Target(self.port, process=psutil.Process(self._process.pid))
        wait_until(lambda: self._is_up(target), START_SECONDS, f"a ready server; its log is\n{self.log_tail()}")
        return target

    def stop(self) -> int | None:
        if self._process is not None:
            stop_server(self._process)
        return self.exit_status()

    def exit_status(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def wait(self, seconds: float) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    def log_tail(self, num_lines: int = 30) -> str:
        file = self.folder / "server.log"
        return "\n".join(file.read_text().splitlines()[-num_lines:]) if file.exists() else ""

    def _is_up(self, target: Target) -> bool:
        if self.exit_status() is not None:
            raise BenchFailed(f"the server ended with status {self.exit_status()}:\n{self.log_tail()}")
        return target.is_ready()


@contextmanager
def running(settings: Settings, environment: Mapping[str, str] | None = None) -> Iterator[Target]:
    """Run a server with a folder of its own until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(settings, Path(folder), environment)
        exit_on_sigterm()
        try:
            yield server.start()
        finally:
            server.stop()


def wait_until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.2) -> float:
    """Wait for a condition and return the seconds that it took. Raises `BenchFailed`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise BenchFailed(f"waited {seconds:g} seconds for {what}")
        time.sleep(pause)
    return time.monotonic() - began
