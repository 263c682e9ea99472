"""Record the functions and the types of the project that one request enters, inside the processes of a real server.

`bench.structure` starts the server with a `sitecustomize` module that calls `install`, so the server's code stays as it
is. In the API process a window opens at the route's endpoint and closes when the request is sent to the worker. In the
worker it opens when the request arrives and closes at the engine's step.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOMS = ("kernels", "model", "server")
ENDPOINTS = frozenset({"create_completion", "create_fewshot_completion", "create_classification"})
REQUESTS = frozenset({"Generate", "Score"})
STEP = "Engine.step"
# the signal that arms the tracer of a process: from then on its main thread is traced
SIGNAL = signal.SIGUSR1


@dataclass(slots=True)
class Window:
    """The names that one request has entered so far.

    `outer` holds the frames that were entered before the window opened. `records` are those of `types` that hold data:
    dataclasses, structs, schemas and enumerations.
    """

    outer: set[FrameType]
    functions: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)

    def add(self, function: str, values: Iterable[Any]) -> None:
        self.functions.add(function)
        for kind in map(type_of, values):
            if name := type_name(kind):
                self.types.add(name)
                if is_record(kind):
                    self.records.add(name)

    def as_json(self) -> str:
        names = {"functions": self.functions, "types": self.types, "records": self.records}
        return json.dumps({kind: sorted(values) for kind, values in names.items()})


# the window of one request, which the tasks and threads of the request inherit
_followed: ContextVar[Window | None] = ContextVar("followed", default=None)


class Tracer:
    """Writes `N.ROLE.json` into a folder of this process for its Nth request. `role` is "api" or "worker"."""

    def __init__(self, root: Path, folder: Path, role: str) -> None:
        self._root = f"{root}{os.sep}"
        self._folder = folder / str(os.getpid())
        self._role = role
        self._window: Window | None = None
        self._openers: list[object] = []

    def install(self) -> None:
        threading.setprofile(self.profile)
        signal.signal(SIGNAL, self._arm)
        self._folder.mkdir()

    def _arm(self, *_: object) -> None:
        sys.setprofile(self.profile)
        (self._folder / "armed").touch()

    def profile(self, frame: FrameType, event: str, value: Any) -> None:
        """Record one event; the arguments are those of a profile function for `sys.setprofile`."""
        if event not in ("call", "return") or not (function := self._function(frame.f_code)):
            return
        seen = list(arguments(frame)) if event == "call" else [value]
        if self._window is None and event == "call":
            self._open(frame, self._opener(frame, seen))
        window = self._window
        if window is None or _followed.get() is not window or frame in window.outer:
            return
        window.add(function, seen)
        if event == "call" and self._closes(frame.f_code, seen):
            _write(self._folder / f"{len(self._openers):03}.{self._role}.json", window.as_json())
            self._window = None

    def _function(self, code: CodeType) -> str | None:
        """Return `file:qualified name`; None for foreign code, and for lambdas, comprehensions and module bodies."""
        path = code.co_filename.removeprefix(self._root)
        if path == code.co_filename or code.co_name.startswith("<") or path.split(os.sep)[0] not in ROOMS:
            return None
        return f"{path}:{code.co_qualname}"

    def _opener(self, frame: FrameType, seen: Sequence[Any]) -> object | None:
        """Return the frame of an endpoint, or a message that the worker takes outside of a step; either opens a window."""
        if self._role == "api":
            return frame if frame.f_code.co_name in ENDPOINTS else None
        is_in_step = any(caller.f_code.co_qualname == STEP for caller in _callers(frame))
        return None if is_in_step else next(filter(is_request, seen), None)

    def _open(self, frame: FrameType, opener: object | None) -> None:
        """Open one window per opener: the frame of an endpoint is entered again after each await."""
        if opener is None or any(opener is known for known in self._openers):
            return
        self._openers.append(opener)
        self._window = Window(outer=set(_callers(frame)))
        _followed.set(self._window)

    def _closes(self, code: CodeType, seen: Sequence[Any]) -> bool:
        if self._role == "api":
            return code.co_name == "send" and any(map(is_request, seen))
        return code.co_qualname == STEP


def install(root: str, folder: str) -> None:
    """Trace this process if it is a server's API process or a child that may be its worker."""
    if role := role_of(sys.orig_argv):
        Tracer(Path(root), Path(folder), role).install()


def role_of(command: Sequence[str]) -> str | None:
    """Return "api" for `python -m server`, and "worker" for other modules of the server: requests arrive in no other."""
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    if module.partition(".")[0] != "server":
        return None
    return "api" if module == "server" else "worker"


def arguments(frame: FrameType) -> Iterator[Any]:
    """Yield the arguments of a frame that has just been entered, those of `*args` and `**kwargs` one by one."""
    code, values = frame.f_code, frame.f_locals
    num_named = code.co_argcount + code.co_kwonlyargcount
    yield from (values.get(name) for name in code.co_varnames[:num_named])
    if code.co_flags & inspect.CO_VARARGS:
        yield from values.get(code.co_varnames[num_named], ())
        num_named += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        yield from values.get(code.co_varnames[num_named], {}).values()


def is_request(value: Any) -> bool:
    return type(value).__name__ in REQUESTS and type_name(type(value)) is not None


def type_of(value: Any) -> type:
    """Return the class of a value, or the value itself if it is a class."""
    return value if isinstance(value, type) else type(value)


def type_name(kind: type) -> str | None:
    """Return the qualified name of a class of the project, or None for any other class."""
    module = kind.__module__
    if module == "__main__" and (spec := sys.modules["__main__"].__spec__) is not None:
        module = spec.name
    return f"{module}.{kind.__qualname__}" if module.partition(".")[0] in ROOMS else None


def is_record(kind: type) -> bool:
    """Return whether the class is a dataclass, a msgspec struct, a pydantic model or an enumeration."""
    markers = ("__dataclass_fields__", "__struct_fields__", "__pydantic_fields__", "__members__")
    return any(hasattr(kind, marker) for marker in markers)


def _callers(frame: FrameType) -> Iterator[FrameType]:
    caller = frame.f_back
    while caller is not None:
        yield caller
        caller = caller.f_back


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
