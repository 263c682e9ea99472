"""Finds the folder of the application, which contains `server`, `model` and others, and makes it importable.

A wheel carries the application in `flamboyance/app`, so that no package named `server` or `model` is installed. In a clone,
and in an editable installation, the folder is the root of the repository.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "app" if (PACKAGE / "app").is_dir() else PACKAGE.parent


def load(module: str) -> ModuleType:
    """Import a module of the application, which takes precedence over installed packages of the same name."""
    if sys.path[:1] != [str(ROOT)]:
        sys.path.insert(0, str(ROOT))
    return import_module(module)
