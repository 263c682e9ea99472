"""Tests that `__all__` lists all imported names and all errors."""

from __future__ import annotations

import flamboyance_client
from flamboyance_client import errors


def test_everything_imported_is_exported() -> None:
    exported = {n for n in vars(flamboyance_client) if not n.startswith("_")}
    modules = {n for n in exported if type(getattr(flamboyance_client, n)).__name__ == "module"}
    assert exported - modules == set(flamboyance_client.__all__)


def test_the_error_tree_is_documented_and_exported() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert errors.__doc__
    for kind in kinds:
        assert kind.__name__ in errors.__doc__
        assert kind.__name__ in flamboyance_client.__all__
