"""JSON objects in requests. JSON has no infinity, but pydantic reads 1e400 as one, and msgspec would write it as null."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("may not contain numbers that are not finite") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
