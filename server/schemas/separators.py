"""Counts the separators of JSON, which tell how many values it has before it is parsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from server.errors import BodyTooLarge

# Parsing takes much longer per value, and per name of a field, than per byte. No body of a sensible request has as many.
MAX_SEPARATORS = {b",": 2**19, b":": 2**16}


def check_separators(
    data: bytes, limits: Mapping[bytes, int], name: str, counted: Counter[bytes] | None = None
) -> None:
    """Check the numbers of separators in a part of a request, which `name` stands for. Raises `BodyTooLarge`.

    `counted`: the numbers in earlier data of the same part, to which those in `data` are added.
    """
    numbers = Counter[bytes]() if counted is None else counted
    for separator, limit in limits.items():
        numbers[separator] += data.count(separator)
        if numbers[separator] > limit:
            raise BodyTooLarge(f"{name} has more than {limit} times the character {separator.decode()!r}")
