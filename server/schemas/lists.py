"""Lets the validation of a list end at its first invalid entry: a body may have 500,000, and one of them is reported."""

from __future__ import annotations

from typing import Any

from pydantic_core import CoreSchema


def stop_at_first_error(schema: CoreSchema) -> CoreSchema:
    """Return the schema of a model with lists, in its own fields, that end at the first invalid entry."""
    _change_lists(schema, is_outside=True)
    return schema


def _change_lists(schema: Any, *, is_outside: bool) -> None:
    """Change the lists in a part of a schema, except those of inner models, which have changed theirs.

    A part that `is_outside` has not reached the fields of the model yet.
    """
    if isinstance(schema, list | tuple):
        for entry in schema:
            _change_lists(entry, is_outside=is_outside)
    elif isinstance(schema, dict) and (is_outside or schema.get("type") != "model"):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _change_lists(part, is_outside=is_outside and schema.get("type") != "model")
