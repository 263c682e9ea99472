"""The bodies of requests as JSON, and the fields whose values JSON in UTF-8 cannot hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from math import isfinite
from typing import Any


def encoded(body: Mapping[str, Any]) -> bytes:
    """Return a body as JSON.

    Raises `ValueError` for a number or a text that it cannot hold, with the name of the field, and `TypeError` for
    an object of another type.
    """
    try:
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain)
        return text.encode()
    except ValueError:
        check_values(body)
        raise


def _plain(value: Any) -> Any:
    """Return a number or a list of NumPy or pandas, a set or a range in the types of JSON."""
    if hasattr(value, "tolist") and len(value.shape) < 2:
        return value.tolist()
    if isinstance(value, Set | range):
        return list(value)
    raise TypeError(f"a request cannot have a value of the type {type(value).__name__}")


def check_values(fields: Mapping[str, Any]) -> None:
    """Raise `ValueError` for NaN, an infinity or half of a surrogate pair, with the name of its field."""
    for fault in _faults(fields, ""):
        raise ValueError(fault)


def _faults(value: Any, field: str) -> Iterator[str]:
    if isinstance(value, float) and not isfinite(value):
        yield f"{field}: {value} is not a finite number"
    elif isinstance(value, str) and not value.isascii():
        yield from _faults_of_text(value, field)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _faults(item, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _faults(item, f"{field}[{index}]")


def _faults_of_text(value: str, field: str) -> Iterator[str]:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = value[error.start]
        yield f"{field}: the text has {character!r} at {error.start}, a surrogate, which UTF-8 cannot encode"
