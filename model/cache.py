"""The cache of imported models: a folder of model folders, each of which is created once, by a separate process."""

from __future__ import annotations

import logging
from pathlib import Path


def cache_folder(folder: Path | None = None) -> Path:
    """Return the absolute path of the cache: `folder`, or the default if it is None."""
    return Path.home() / ".cache" / "flamboyance" if folder is None else folder.absolute()


def is_ready(folder: Path) -> bool:
    """Return whether a model folder has been made."""
    # the folder is moved to its path when it is complete, so it is enough to check one file
    return (folder / "config.json").exists()


def log_import() -> None:
    """Log from the process of an import, in lines like those of the server, next to which they appear."""
    line = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, datefmt="%H:%M:%S")
