"""Measure the structure of the code: `python -m bench.structure [--names] [--aside PATH...]`.

Counts lines per top folder, modules that the server imports, and the functions and types that a request enters between its
route and the engine's step, recorded in a real server with a tiny random model.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from bench import random_models
from bench.serving import HOST, free_port, stop_server
from bench.table import ROOT, Bar, Report, Row
from bench.tracer import SIGNAL

ROOMS = ("kernels", "model", "server", "training", "clients", "evaluation", "bench", "tests")
CORE = ("kernels", "model", "server")
NOT_IN_KERNELS = "kernels/bench"
ENTRIES = ("server.app", "server.engine.worker", "server.engine.build")
BUILT = {"build", "dist", "__pycache__"}
WAIT_SECONDS = 180.0
NUM_ROUNDS = 2
NUM_SHOTS = 2
LABELS = ("dog", "cat")


class StructureError(RuntimeError):
    """A measurement is not possible; the message says which and why."""


# lines and files


def python_files(folder: Path) -> Iterator[Path]:
    """Yield all Python files of a file or folder except for build outputs, in order."""
    if folder.is_file():
        yield folder
        return
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not BUILT.intersection(parts) and not any(part.startswith(".") for part in parts):
            yield path


def num_lines(files: Iterable[Path]) -> int:
    return sum(file.read_bytes().count(b"\n") for file in files)


def line_rows(root: Path, aside: Sequence[Path]) -> Iterator[Row]:
    """Yield lines by top folder and by folder of the server, and the sum of `CORE` with and without the files aside."""
    rooms = {room: list(_room_files(root, room)) for room in ROOMS}
    for room, files in rooms.items():
        yield _row("lines", f"{room} without {NOT_IN_KERNELS}" if room == "kernels" else room, num_lines(files))
        if room == "server":
            yield from (_row("lines", f"server/{name}", num_lines(below)) for name, below in _by_folder(root).items())
    core = {file for room in CORE for file in rooms[room]}
    yield _row("lines", " + ".join(CORE), num_lines(core))
    if aside:
        excluded = {file.resolve() for path in aside for file in python_files(path)}
        yield _row("lines", "aside", num_lines(excluded))
        yield _row("lines", f"{' + '.join(CORE)}, less aside", num_lines(core - excluded))


def _room_files(root: Path, room: str) -> Iterator[Path]:
    files = python_files(root / room)
    return (file for file in files if not file.is_relative_to(root / NOT_IN_KERNELS))


def _by_folder(root: Path) -> dict[str, list[Path]]:
    """Return the server's files by the folder directly below `server`; "*.py" are those in none."""
    folders: dict[str, list[Path]] = {"*.py": []}
    for file in python_files(root / "server"):
        parts = file.relative_to(root / "server").parts
        folders.setdefault(parts[0] if len(parts) > 1 else "*.py", []).append(file)
    return folders


def largest_folder(root: Path) -> Row:
    """Return the folder at or below `server` with the most Python files directly in it."""
    files = [file.parent.relative_to(root).as_posix() for file in python_files(root / "server")]
    folder = max(sorted(set(files)), key=files.count)
    return _row("files, largest folder of the server", folder, files.count(folder))


# imports


def import_rows(root: Path, entries: Sequence[str]) -> Iterator[Row]:
    for entry in entries:
        yield import_row(root, [entry], entry)
    yield import_row(root, entries, "all of them")


def import_row(root: Path, entries: Sequence[str], name: str) -> Row:
    """Count the project's modules that a fresh process holds after the imports; `packages` of them are packages."""
    script = (
        f"import json, sys, {', '.join(entries)}\n"
        "print(json.dumps({name: hasattr(module, '__path__') for name, module in sys.modules.items()}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StructureError(f"import of {', '.join(entries)} failed:\n{done.stderr}")
    loaded: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    project = [is_package for module, is_package in loaded.items() if module.partition(".")[0] in ROOMS]
    return {**_row("modules imported", name, len(project)), "packages": sum(project)}


# functions and types of a request


@dataclass(frozen=True, slots=True)
class Trace:
    """Qualified names of the functions and types of the project that one request has entered.

    `records` are those of `types` that hold data: dataclasses, structs, schemas and enumerations.
    """

    functions: frozenset[str]
    types: frozenset[str]
    records: frozenset[str]

    def __or__(self, other: Trace) -> Trace:
        return Trace(self.functions | other.functions, self.types | other.types, self.records | other.records)

    def __xor__(self, other: Trace) -> Trace:
        return Trace(self.functions ^ other.functions, self.types ^ other.types, self.records ^ other.records)

    def __len__(self) -> int:
        return len(self.functions) + len(self.types)

    def names(self) -> str:
        lines = [f"  function  {name}" for name in sorted(self.functions)]
        types = {name: "record  " if name in self.records else "type    " for name in sorted(self.types)}
        return "\n".join([*lines, *(f"  {kind}  {name}" for name, kind in types.items())])


def completion(new_image: Callable[[], str]) -> dict[str, Any]:
    parts = []
    for number in range(NUM_SHOTS + 1):
        parts.append({"type": "image_url", "image_url": {"url": new_image()}})
        parts.append({"type": "text", "text": f"Output: {LABELS[number % len(LABELS)]}"})
    return {"prompt": [*parts[:-1], {"type": "text", "text": "Output:"}], "max_tokens": 1, "temperature": 0}


def fewshot(new_image: Callable[[], str]) -> dict[str, Any]:
    shots = [{"image": new_image(), "text": LABELS[number]} for number in range(NUM_SHOTS)]
    return {"shots": shots, "query": {"image": new_image()}, "max_tokens": 1, "temperature": 0}


def classification(new_image: Callable[[], str]) -> dict[str, Any]:
    """Return a request without `candidates`, which are the labels of the shots, that the language model answers."""
    shots = [{"image": new_image(), "label": LABELS[number]} for number in range(NUM_SHOTS)]
    return {"shots": shots, "query": {"image": new_image()}, "method": "in_context"}


ROUTES = {"/v1/completions": completion, "/v1/fewshot/completions": fewshot, "/v1/classify": classification}


def _is_armed_or_gone(folder: Path) -> bool:
    return (folder / "armed").exists() or not psutil.pid_exists(int(folder.name))


class TracedServer:
    """A running server whose processes carry a tracer that writes into `folder`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
        self._process = process
        self._port = port
        self._folder = folder
        self._num_images = 0

    def wait_until_ready(self) -> None:
        self._wait("the server to be ready", self._is_ready)

    def warm(self, routes: Mapping[str, Callable[..., Any]]) -> None:
        """Send one request of each kind before the tracers are armed, so that set-up that happens once is not recorded."""
        for route, body in routes.items():
            self._post(route, body(self._new_image))
        for folder in self._folder.glob("[0-9]*"):
            with suppress(ProcessLookupError):  # it computed the digests of the weights, and has ended
                os.kill(int(folder.name), SIGNAL)
                self._wait("the tracers", partial(_is_armed_or_gone, folder))

    def trace(self, route: str, body: Callable[..., Any]) -> Trace:
        self._post(route, body(self._new_image))
        return self._take("api") | self._take("worker")

    def _take(self, role: str) -> Trace:
        """Return the first record that a process has written since the last call; a request can send several messages."""
        files = sorted(self._folder.glob(f"[0-9]*/*.{role}.json"))
        if not files:
            raise StructureError(f"the {role} process recorded nothing: is a route, message or engine of another name?")
        record = json.loads(files[0].read_text(encoding="utf-8"))
        for file in files:
            file.unlink()
        return Trace(*(frozenset(record[kind]) for kind in ("functions", "types", "records")))

    def _post(self, route: str, body: Mapping[str, Any]) -> None:
        status, answer = self._request("POST", route, json.dumps(body))
        if status != 200:
            raise StructureError(f"POST {route} was answered {status}: {answer}")

    def _is_ready(self) -> bool:
        try:
            return self._request("GET", "/health/ready")[0] == 200
        except OSError:
            return False

    def _request(self, method: str, route: str, body: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=WAIT_SECONDS)
        try:
            connection.request(method, route, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _wait(self, event: str, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not is_done():
            if self._process.poll() is not None or time.monotonic() > end:
                log = (self._folder / "server.log").read_text()
                raise StructureError(f"timed out waiting for {event} (exit status {self._process.poll()}):\n{log}")
            time.sleep(0.05)

    def _new_image(self) -> str:
        """Return the data URL of an image that no earlier request has sent."""
        self._num_images += 1
        pixels = np.random.default_rng(self._num_images).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


@contextmanager
def serving(root: Path) -> Iterator[TracedServer]:
    """Start a server of the tiny random model with a `sitecustomize` that installs the tracer in its processes."""
    with tempfile.TemporaryDirectory() as name, (Path(name) / "server.log").open("wb") as log:
        folder, port = Path(name), free_port()
        hook = f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom bench.tracer import install\n"
        (folder / "sitecustomize.py").write_text(f"{hook}install({str(root)!r}, {name!r})\ndel sys.path[0]\n")
        flags = {"model": random_models.folder("tiny"), "data-dir": folder / "data", "host": HOST, "port": port}
        command = [sys.executable, "-m", "server", *(f"--{flag}={value}" for flag, value in flags.items())]
        process = subprocess.Popen(["env", f"PYTHONPATH={name}", *command], cwd=root, stdout=log, stderr=log)
        try:
            server = TracedServer(process, port, folder)
            server.wait_until_ready()
            yield server
        finally:
            stop_server(process)


def trace_routes(root: Path, routes: Mapping[str, Callable[..., Any]]) -> list[dict[str, Trace]]:
    """Return, for each round, the trace of one request per route."""
    with serving(root) as server:
        server.warm(routes)
        return [{route: server.trace(route, body) for route, body in routes.items()} for _ in range(NUM_ROUNDS)]


def _row(measure: str, name: str, number: int) -> Row:
    return {"measure": measure, "of": name, "number": number}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if missing := [str(path) for path in options.aside if not path.exists()]:
        parser.error(f"--aside: no such file or folder: {', '.join(missing)}")
    report = Report("The structure of the code", {"aside": " ".join(map(str, options.aside)) or "nothing"})
    report.rows.extend([*line_rows(ROOT, options.aside), largest_folder(ROOT), *import_rows(ROOT, options.entries)])
    if not options.static:
        _add_traces(report, trace_routes(ROOT, ROUTES), options.names)
    report.print()
    return 0 if all(bar.is_met for bar in report.bars) else 1


def _add_traces(report: Report, rounds: Sequence[Mapping[str, Trace]], with_names: bool) -> None:
    for route, trace in rounds[0].items():
        counts = {"functions": len(trace.functions), "types": len(trace.types), "records": len(trace.records)}
        report.add({**_row("functions and types of a request", route, len(trace)), **counts})
        different = [trace ^ other[route] for other in rounds[1:]]
        name = f"{route}: names that differ between requests"
        report.bars.append(Bar(name=name, value=max(map(len, different)), at_most=0))
        if with_names:
            print(f"{route}\n{trace.names()}\n")
            for names in filter(len, different):
                print(f"{route}, not in every request\n{names.names()}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.structure", description=__doc__)
    parser.add_argument(
        "--aside", nargs="+", type=Path, default=[], metavar="PATH", help="files not to count in the sum"
    )
    parser.add_argument("--entries", nargs="+", default=ENTRIES, metavar="MODULE", help="modules to import and count")
    parser.add_argument("--names", action="store_true", help="list the functions and types of each request")
    parser.add_argument("--static", action="store_true", help="start no server: count only lines, files and imports")
    return parser


if __name__ == "__main__":
    sys.exit(main())
