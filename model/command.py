"""Runs the commands that write model folders: prints what they return, or their error in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from model.config import ConfigError
from model.folder import CheckpointError
from model.hub.sources import ModelNameError
from model.zoo.fetch import DefaultModelError


def run(command: Callable[[], object]) -> int:
    """Run a command, and return its exit status: 2 if a model is not found by its name, 1 for any other known error."""
    try:
        print(command())
    except (ModelNameError, DefaultModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
