"""Completes the names of sets in a shell, with those that the server has sent within two seconds."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from threading import Thread

import typer

from flamboyance_client.cli.connection import DEFAULT_URL
from flamboyance_client.cli.pages import all_items
from flamboyance_client.client import Client
from flamboyance_client.errors import FlamboyanceError
from flamboyance_client.retries import Retries

SECONDS = 2.0
# sets that are looked at: a person does not read a list of more
MAX_SETS = 1000


def set_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names that begin with `incomplete`, of sets of the server that the command line names."""
    url, api_key, names = context.params.get("url") or DEFAULT_URL, context.params.get("api_key"), list[str]()

    def read() -> None:
        with (
            suppress(FlamboyanceError, OSError, ValueError, ImportError),  # as in `connected`, without a message
            Client(url, api_key=api_key, timeout=SECONDS, retries=Retries(limit=0)) as client,
        ):
            for support_set in islice(all_items(client.support_sets.list), MAX_SETS):
                names.append(support_set.name or "")

    # a thread, because a timeout of the client is that of a single read
    reading = Thread(target=read, daemon=True)
    reading.start()
    reading.join(SECONDS)
    return [name for name in names if name and name.startswith(incomplete)]
