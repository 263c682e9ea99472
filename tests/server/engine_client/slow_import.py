"""A scripted engine whose import takes a while, as torch's does, and leaves a file when it is done."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.server.scripted_engine import build

__all__ = ["build"]

time.sleep(0.5)
Path(os.environ["SLOW_IMPORTS"], f"imported-{os.getpid()}").touch()
