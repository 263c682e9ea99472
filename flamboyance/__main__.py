"""The command `flamboyance`, as a script and as `python -m flamboyance`, also in a clone that is not installed."""

from __future__ import annotations

import signal
import sys
from importlib import import_module


def main() -> int:
    """Run the command and return its exit status. An interrupt ends it without a traceback, also while it imports."""
    try:
        status: int = import_module("flamboyance.command_line").main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


if __name__ == "__main__":
    sys.exit(main())
