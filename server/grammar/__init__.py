"""Constrains answers to grammars.

`compiler.py` compiles them, `matcher.py` follows them, and `json_schema.py` prepares JSON schemas: `schema_graph.py` finds
the schemas that one consists of, `schema_keywords.py` translates keywords that the compiler does not know, and
`schema_limits.py` refuses what it cannot compile. `refusals.py` says why a grammar is refused. `trial.py` compiles each
grammar first, in a process of its own, which `trials.py` runs; `heap.py` measures its memory.
"""

from __future__ import annotations


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for the client. `reason` is that of a library, for the log."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class TrialUnavailable(Exception):
    """The trial process does not start or answer, which is not the grammar's fault; the message is for the client."""
