"""Prints the SHA-256 of files, a line for each, at the lowest priority: `python -m server.file_digests FILE ...`.

It runs in a separate process, so that it never holds the interpreter lock for which the event loop waits.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence

LOWEST_PRIORITY = 19


def main(files: Sequence[str]) -> int:
    os.nice(LOWEST_PRIORITY)
    for name in files:
        with open(name, "rb") as file:
            print(hashlib.file_digest(file, "sha256").hexdigest(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
