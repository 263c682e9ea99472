"""`python -m server`: serves until a signal. An interrupt ends it without a traceback, also while it imports."""

from __future__ import annotations

import signal
import sys
from importlib import import_module


def main() -> int:
    """Serve until a signal, and return the exit status."""
    try:
        is_handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_handled:  # an exception within an import could crash an extension module
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        module = import_module("server.start")
        if is_handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status: int = module.main(sys.argv[1:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


if __name__ == "__main__":
    sys.exit(main())
