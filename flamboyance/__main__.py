"""`python -m flamboyance` is the command `flamboyance`, also in a clone that is not installed."""

from __future__ import annotations

import sys

from flamboyance.command_line import main

if __name__ == "__main__":
    sys.exit(main())
