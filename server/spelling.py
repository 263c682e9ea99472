"""Finds the name that was probably meant by an unknown one, for error messages."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

# the similarity of two names (`difflib`) from which one was probably meant: about 0.9 for one wrong letter
SIMILAR = 0.75
# comparing takes a time in proportion to the length, which no name needs
MAX_COMPARED = 64


def advice(name: str, known: Collection[str]) -> str:
    """Return a question for the end of a message, "" if no known name is similar."""
    close = get_close_matches(name[:MAX_COMPARED], sorted(known), n=1, cutoff=SIMILAR)
    return f"; did you mean {close[0]}?" if close else ""
