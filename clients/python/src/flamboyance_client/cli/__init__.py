"""The command line of the client, `flamboyance-client`. It needs the extra `cli`, which the library does not."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

INTERRUPTED = 130  # the exit status that a shell has for a process that Ctrl-C ends


def main() -> None:
    """Run a command and exit with its status: 0, 1 for a failure, 2 for a wrong command line, 130 after an interrupt."""
    if find_spec("typer") is None:
        print("error: the command line needs another package: pip install 'flamboyance-client[cli]'", file=sys.stderr)
        raise SystemExit(1)
    try:
        status = import_module("flamboyance_client.cli.app").run(sys.argv[1:])
    except KeyboardInterrupt:
        status = INTERRUPTED
    raise SystemExit(status)
