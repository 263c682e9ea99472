"""Finds the folder of the application, which contains `server`, `model` and others, and makes it importable.

A wheel carries the application in `flamboyance/app`, so that no package named `server` or `model` is installed. In a clone,
and in an editable installation, the folder is the root of the repository.
"""

from __future__ import annotations

import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "app" if (PACKAGE / "app").is_dir() else PACKAGE.parent


def load(module: str) -> ModuleType:
    """Import a module of the application, which takes precedence over installed packages of the same name.

    Meanwhile an interrupt ends the process at once: as an exception it could crash an extension module.
    """
    if sys.path[:1] != [str(ROOT)]:
        sys.path.insert(0, str(ROOT))
    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    is_handled = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return import_module(module)
    finally:
        if is_handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
