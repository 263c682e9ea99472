"""Says what is wrong with a body that the parser of JSON refuses."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from typing import Any

from server.errors import InvalidRequest

MAX_NAME = 64  # characters of a client's own name in a message
# the largest body, in bytes, in which the path of a name is looked for: that is slow, and runs in the event loop
MAX_SEARCHED = 2**16
# the parser's sentence for a name that occurs twice in an object
REPEATED = re.compile(r'Detected duplicate key "(?P<name>.*)" at (?P<place>line \d+ column \d+)', re.DOTALL)


def not_json(problem: str, body: bytes) -> InvalidRequest:
    """Return the error of a body in which the parser has found a problem: it is no JSON, or repeats a name."""
    if repeated := REPEATED.fullmatch(problem):
        path = _path_of_repeated(repeated["name"], body)
        return InvalidRequest(f"{path}: set more than once, at {repeated['place']}", param=path)
    if "recursion limit" in problem:
        return InvalidRequest("the body has too many lists and objects in each other")
    return InvalidRequest(f"the body is not JSON: {_other_encoding(body) or problem}")


class _Repeated(dict[str, Any]):
    """An object in which a name occurs twice."""


def _path_of_repeated(name: str, body: bytes) -> str:
    """Return the path of the first object that has a name twice, with the name; in a large body, the name alone."""

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        is_repeated = [each for each, _ in pairs].count(name) > 1
        return _Repeated(pairs) if is_repeated else dict(pairs)

    try:
        paths = _paths_of_repeated(json.loads(body, object_pairs_hook=read)) if len(body) <= MAX_SEARCHED else iter(())
        return next(paths, "") + name[:MAX_NAME]
    except (ValueError, RecursionError):  # after the name, the body may be no JSON
        return name[:MAX_NAME]


def _paths_of_repeated(value: Any, path: str = "") -> Iterator[str]:
    """Yield the beginnings of the paths of the fields of all objects in which a name occurs twice."""
    match value:
        case _Repeated():
            yield f"{path}." if path else ""
        case dict():
            for name, inner in value.items():
                yield from _paths_of_repeated(inner, f"{path}.{name[:MAX_NAME]}" if path else name[:MAX_NAME])
        case list():
            for index, inner in enumerate(value):
                yield from _paths_of_repeated(inner, f"{path}[{index}]")


def _other_encoding(body: bytes) -> str:
    """Return how a body is encoded, empty if it may be UTF-8 without a byte order mark."""
    if not body:
        return "it is empty"
    if body.startswith(BOM_UTF8):
        return "it begins with a byte order mark: send UTF-8 without one"
    # the first character of JSON is ASCII, which has a zero byte in these encodings
    if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in body[:2]:
        return "it looks like UTF-16 or UTF-32: send UTF-8"
    return ""
