"""Completes the names of sets in a shell. The server has a second to answer; without an answer there are no names."""

from __future__ import annotations

from itertools import islice

import typer

from flamboyance_client.cli.connection import DEFAULT_URL
from flamboyance_client.cli.pages import all_items
from flamboyance_client.client import Client
from flamboyance_client.errors import FlamboyanceError
from flamboyance_client.retries import Retries

SECONDS = 1.0
# sets that are looked at: a person does not read a list of more
MAX_SETS = 1000


def set_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names that begin with `incomplete`, of sets of the server that the command line names."""
    url, api_key = context.params.get("url") or DEFAULT_URL, context.params.get("api_key")
    try:
        with Client(url, api_key=api_key, timeout=SECONDS, retries=Retries(limit=0)) as client:
            names = [support_set.name for support_set in islice(all_items(client.support_sets.list), MAX_SETS)]
    except (FlamboyanceError, OSError, ValueError, ImportError):  # as in `connected`; a message would be in the way
        return []
    return [name for name in names if name and name.startswith(incomplete)]
