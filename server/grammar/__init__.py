"""Constrains answers to grammars.

`compiler.py` compiles and follows them, `json_schema.py` prepares JSON schemas for that, and `schema_limits.py` refuses the
ones that cannot be compiled.
"""

from __future__ import annotations


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for the client."""
