"""What training must never see: one function says whether a category is held out, in training and evaluation alike.

A category is held out by its name alone: a fifth of all names, whatever the source that carries them.
"""

from __future__ import annotations

import hashlib

FIFTHS = 5


def held_out(category: str) -> bool:
    """Whether the category of this name belongs to the evaluation."""
    return hashlib.sha256(category.strip().lower().encode()).digest()[0] % FIFTHS == 0


def held_out_image(path: str) -> bool:
    """One image in twelve of a known category is kept for the evaluation of naming."""
    return hashlib.sha256(path.encode()).digest()[1] % 12 == 0
