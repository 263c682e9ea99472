"""Constrains answers to grammars.

`compiler.py` compiles and follows them, `json_schema.py` prepares JSON schemas for that, and `schema_limits.py` refuses the
ones that cannot be compiled. `trial.py` compiles each grammar first, in a process of its own, which `trials.py` runs.
"""

from __future__ import annotations


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for the client."""
