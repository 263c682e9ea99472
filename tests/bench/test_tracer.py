"""The tracer records one request, in tasks and threads that it starts too, and nothing of another."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

from bench.tracer import Tracer, is_record, role_of, type_name

API = """
import asyncio

class Generate: pass

class Worker:
    def send(self, message): encode(message)

def encode(message): pass

async def guard(worker):
    await asyncio.sleep(0)
    await create_completion(worker)

async def create_completion(worker):
    await asyncio.gather(asyncio.to_thread(read, [1]), asyncio.create_task(check()))
    worker.send(Generate())
    after()

def read(values): return [double(value) for value in values]

def double(value): return (lambda: 2 * value)()

async def check(*limits): await asyncio.sleep(0)

def after(): pass

async def another(): unrelated()

def unrelated(): pass
"""

ENGINE = """
class Generate: pass
class Sequence: pass

class Worker:
    def __init__(self, engine): self.engine = engine
    def turn(self, message):
        self.take(message)
        self.engine.step(message)
    def take(self, message): self.engine.add(message)

class Engine:
    def add(self, message): self.build(message)
    def build(self, message): return Sequence()
    def step(self, message): self.forward(Generate())
    def forward(self, message): pass
"""


def load(root: Path, path: str, source: str) -> dict[str, Any]:
    values: dict[str, Any] = {"__name__": path.removesuffix(".py").replace("/", ".")}
    exec(compile(source, str(root / path), "exec"), values)
    return values


def records(folder: Path) -> list[dict[str, list[str]]]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / str(os.getpid())).mkdir()
    return tmp_path


def profiled(tracer: Tracer, run: Callable[[], object]) -> None:
    threading.setprofile(tracer.profile)
    sys.setprofile(tracer.profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


async def send_requests(api: dict[str, Any], num_requests: int) -> None:
    """Send one request after the other, each concurrently with a call that belongs to none."""
    for _ in range(num_requests):
        await asyncio.gather(api["guard"](api["Worker"]()), api["another"]())


def test_a_request_is_followed_from_its_endpoint_to_send(folder: Path) -> None:
    api = load(folder, "server/api/routes.py", API)
    profiled(Tracer(folder, folder, "api"), lambda: asyncio.run(send_requests(api, 2)))
    first, second = records(folder)
    names = ["Worker.send", "check", "create_completion", "double", "read"]
    assert first["functions"] == [f"server/api/routes.py:{name}" for name in names]
    assert first["types"] == ["server.api.routes.Generate", "server.api.routes.Worker"]
    assert second == first


def test_the_worker_is_followed_from_a_new_message_to_the_step(folder: Path) -> None:
    engine = load(folder, "server/engine/engine.py", ENGINE)
    worker = engine["Worker"](engine["Engine"]())

    def run() -> None:
        for _ in range(2):
            worker.turn(engine["Generate"]())

    tracer = Tracer(folder, folder, "worker")
    contextvars.copy_context().run(profiled, tracer, run)
    first, second = records(folder)
    names = ["Engine.add", "Engine.build", "Engine.step", "Worker.take", "Worker.turn"]
    assert first["functions"] == [f"server/engine/engine.py:{name}" for name in names]
    assert first["types"] == [f"server.engine.engine.{name}" for name in ("Engine", "Generate", "Sequence", "Worker")]
    assert second == first


class Colour(Enum):
    RED = 1


@dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Colour, True),
        (Point, True),
        (msgspec.defstruct("Struct", []), True),
        (pydantic.create_model("Model"), True),
        (Tracer, False),
        (int, False),
    ],
)
def test_records_are_types_that_hold_data(kind: type, expected: bool) -> None:
    assert is_record(kind) is expected


def test_a_type_of_another_project_has_no_name() -> None:
    assert type_name(int) is None
    assert type_name(type("Text", (), {"__module__": "model.prompt"})) == "model.prompt.Text"
    assert type_name(type("Modeller", (), {"__module__": "modelling"})) is None


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["python", "-m", "server", "--port=1"], "api"),
        (["python", "-m", "server.engine.worker"], "worker"),
        (["python", "-m", "model.zoo"], None),
        (["python", "-c", "import server"], None),
        (["python", "-m"], None),
    ],
)
def test_the_role_is_read_from_the_command_line(command: list[str], role: str | None) -> None:
    assert role_of(command) == role
