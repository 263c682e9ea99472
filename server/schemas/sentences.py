"""Puts pydantic's errors in words: a sentence to follow the path of a value, such as "must be at least 1"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# sentences in place of pydantic's messages, with the parts of an error's context
SENTENCES = {
    "missing": "is required, but missing or null",
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("int_from_float", "int_parsing", "int_parsing_size", "int_type"), "must be an integer"),
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "path_type": "must be a path",
    "string_type": "must be a string",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}


def in_words(problem: Mapping[str, Any]) -> str:
    """Return what a value must be, for one of the errors of a `ValidationError`."""
    context = problem.get("ctx", {})
    if isinstance(error := context.get("error"), Exception):
        return str(error)
    if sentence := SENTENCES.get(problem["type"]):
        text = sentence.format_map(context).removesuffix(".0")
        return re.sub(r" 1 entries$", " 1 entry", re.sub(r" 1 characters$", " 1 character", text))
    return str(problem["msg"]).replace(" after validation", "")
