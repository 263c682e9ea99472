"""`python -m flamboyance_client` is the command `flamboyance-client`."""

from __future__ import annotations

from flamboyance_client.cli import main

if __name__ == "__main__":
    main()
