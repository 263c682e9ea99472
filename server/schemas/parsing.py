"""Says what is wrong with a body that the parser of JSON refuses."""

from __future__ import annotations

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE

from server.errors import InvalidRequest

MAX_NAME = 64  # characters of a client's own name in a message
# the parser's sentence for a name that occurs twice in an object
REPEATED = re.compile(r'Detected duplicate key "(?P<name>.*)" at (?P<place>line \d+ column \d+)', re.DOTALL)


def not_json(problem: str, body: bytes) -> InvalidRequest:
    """Return the error of a body in which the parser has found a problem: it is no JSON, or repeats a name."""
    if repeated := REPEATED.fullmatch(problem):
        field = repeated["name"][:MAX_NAME]
        return InvalidRequest(f"{field}: set more than once, at {repeated['place']}", param=field)
    if "recursion limit" in problem:
        return InvalidRequest("the body has too many lists and objects in each other")
    return InvalidRequest(f"the body is not JSON: {_other_encoding(body) or problem}")


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
