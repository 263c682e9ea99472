"""The command line of the client, `flamboyance-client`. It needs the extra `cli`, which the library does not."""

from __future__ import annotations

import sys
from importlib import import_module

INTERRUPTED = 130  # the exit status that a shell has for a process that Ctrl-C ends
EXTRA = ("typer", "rich")


def main() -> None:
    """Run a command and exit with its status: 0, 1 for a failure, 2 for a wrong command line, 130 after an interrupt."""
    try:
        status = import_module("flamboyance_client.cli.app").run(sys.argv[1:])
    except KeyboardInterrupt:
        status = INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print("error: the command line needs another package: pip install 'flamboyance-client[cli]'", file=sys.stderr)
        status = 1
    raise SystemExit(status)
