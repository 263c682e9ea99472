"""Validates the JSON objects of requests.

JSON has no infinity, but pydantic reads 1e400 as one, and msgspec would write it as null. Writing an integer takes a time
that is quadratic in its digits: a body of 8 MiB could take seconds.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator

MAX_DIGITS = 300
LIMIT = 10**MAX_DIGITS


def check_numbers(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value unchanged. Raises `ValueError` for numbers that are not finite, and for very long integers."""
    values: list[Any] = [value]
    for part in values:  # to which the values in it are added
        if isinstance(part, dict):
            values += part.values()
        elif isinstance(part, list):
            values += part
        elif isinstance(part, float):
            if not isfinite(part):
                raise ValueError("may not contain numbers that are not finite")
        elif isinstance(part, int) and abs(part) >= LIMIT:
            raise ValueError(f"may not contain integers of more than {MAX_DIGITS} digits")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(check_numbers)]
