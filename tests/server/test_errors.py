"""The tree in the docstring of `server.errors` equals the tree of classes, with their statuses."""

from __future__ import annotations

import re

from server import errors
from server.errors import ServerError

LINE = re.compile(r"^( {4}[│├└─ ]*)(\w+) +(\d{3})?", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, int | None]]:
    """Return each class of the drawing with its parent and its status."""
    classes: dict[str, tuple[str | None, int | None]] = {}
    trail: list[str] = []
    for indent, name, status in LINE.findall(errors.__doc__ or ""):
        depth = (len(indent) - 4) // 4
        trail[depth:] = [name]
        classes[name] = (trail[depth - 1] if depth else None, int(status) if status else None)
    return classes


def subclasses(root: type[ServerError]) -> list[type[ServerError]]:
    return [root, *(descendant for child in root.__subclasses__() for descendant in subclasses(child))]


def test_the_drawn_tree_equals_the_classes() -> None:
    tree, every = drawn(), subclasses(ServerError)
    assert tree.keys() == {kind.__name__ for kind in every}
    for kind in every[1:]:
        parent, status = tree[kind.__name__]
        assert kind.__base__ is not None
        assert kind.__base__.__name__ == parent
        assert status in (kind.status, None)


def test_each_error_has_a_different_code() -> None:
    every = subclasses(ServerError)
    assert len({kind.code for kind in every}) == len(every)
