"""A process whose `classify_many` is interrupted: `python -m tests.clients.python.interrupted URL`.

It then prints the name of the interrupt, and ends when its stdin does.
"""

from __future__ import annotations

import signal
import sys

from flamboyance_client import Client


def main(url: str) -> None:
    # a process in the background of a shell ignores the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    client = Client(url)
    try:
        client.classify_many([b"a"] * 10, concurrency=2)
    except KeyboardInterrupt as interrupt:
        print(type(interrupt).__name__, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
