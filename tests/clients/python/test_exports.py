"""Tests that the package exports all imported names and all errors, and imports them when the first one is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flamboyance_client
from flamboyance_client import errors, exports


def words(code: str) -> list[str]:
    """Return the words that a process prints."""
    source = Path(exports.__file__).parents[1]
    return subprocess.check_output([sys.executable, "-c", code], cwd=source, text=True).split()


def test_everything_imported_is_exported() -> None:
    assert {name for name in vars(exports) if not name.startswith("_")} == set(exports.__all__)
    assert flamboyance_client.__all__ == exports.__all__
    assert set(exports.__all__) <= set(dir(flamboyance_client))
    for name in exports.__all__:
        assert getattr(flamboyance_client, name) is getattr(exports, name)


def test_the_error_tree_is_documented_and_exported() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert errors.__doc__
    for kind in kinds:
        assert kind.__name__ in errors.__doc__
        assert kind.__name__ in exports.__all__


@pytest.mark.parametrize("use", ["from flamboyance_client import *", "flamboyance_client.Client"])
def test_names_are_imported_when_the_first_is_used(use: str) -> None:
    code = f"import flamboyance_client, sys\nprint('httpx' in sys.modules)\n{use}\nprint('httpx' in sys.modules)"
    assert words(code) == ["False", "True"]


def test_a_module_is_imported_without_the_names() -> None:
    code = "import flamboyance_client, sys\nprint(flamboyance_client.sse.__name__, 'httpx' in sys.modules)"
    assert words(code) == ["flamboyance_client.sse", "False"]


@pytest.mark.parametrize("name", ["Clients", "_checked"])
def test_other_names_do_not_exist(name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(flamboyance_client, name)
