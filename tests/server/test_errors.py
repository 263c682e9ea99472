"""The tree in the docstring is the tree of classes, with each one's status."""

from __future__ import annotations

import re

from server import errors
from server.errors import ServerError

LINE = re.compile(r"^( {4}[│├└─ ]*)(\w+) +(\d{3})?", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, int | None]]:
    """Class -> its parent and the status that stands beside it, by the depth of the drawing."""
    found: dict[str, tuple[str | None, int | None]] = {}
    trail: list[str] = []
    for indent, name, status in LINE.findall(errors.__doc__ or ""):
        depth = (len(indent) - 4) // 4
        trail[depth:] = [name]
        found[name] = (trail[depth - 1] if depth else None, int(status) if status else None)
    return found


def classes(root: type[ServerError]) -> list[type[ServerError]]:
    return [root, *(found for child in root.__subclasses__() for found in classes(child))]


def test_the_drawing_is_the_tree() -> None:
    tree, every = drawn(), classes(ServerError)
    assert tree.keys() == {kind.__name__ for kind in every}
    for kind in every[1:]:
        parent, status = tree[kind.__name__]
        assert kind.__base__ is not None
        assert kind.__base__.__name__ == parent
        assert status in (kind.status, None)


def test_codes_tell_errors_apart() -> None:
    every = classes(ServerError)
    assert len({kind.code for kind in every}) == len(every)
