"""The version of the application: that of the clone's pyproject.toml, or of the installed distribution."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

# only a clone has this file: the version of an installed distribution must not be reported for the clone
PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def read_version() -> str:
    """Return the version, such as "0.1.0"."""
    if not PROJECT.exists():
        return metadata.version("flamboyance")
    version: str = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"]
    return version


VERSION = read_version()
