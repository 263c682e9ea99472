"""Counts the separators of JSON, which tell how many values it has before it is parsed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from server.errors import BodyTooLarge

# Parsing takes much longer per value, per name of a field, and per list or object than per byte. No body of a sensible
# request has as many. A colon stands for a name.
MAX_SEPARATORS = {b",": 2**19, b":": 2**16, b"[": 2**16, b"{": 2**16}
# the end of a name; colons are counted first, which takes less time
NAME = re.compile(rb'"[ \t\r\n]*:')
WORDS = {b",": "commas", b":": "names of fields", b"[": "lists", b"{": "objects"}


def check_separators(
    data: bytes, limits: Mapping[bytes, int], name: str, counted: Counter[bytes] | None = None
) -> None:
    """Check the numbers of separators in a part of a request, which `name` stands for. Raises `BodyTooLarge`.

    `counted`: the numbers in earlier data of the same part, to which those in `data` are added.
    """
    numbers = Counter[bytes]() if counted is None else counted
    for separator, limit in limits.items():
        number = data.count(separator)
        if separator == b":" and number + numbers[separator] > limit:  # many colons may be in texts
            number = len(NAME.findall(data))
        numbers[separator] += number
        if numbers[separator] > limit:
            raise BodyTooLarge(f"{name} has more than {limit} {WORDS[separator]}")
