"""The options of the commands that measure a running server, and their connection to it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flamboyance_client import Client, FlamboyanceError, NotAuthorised, NotConnected
from training.default_data.records import DATA, DEFAULT_FOLDER


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the server and for the images of its queries."""
    parser.add_argument("url", help="the server's URL, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="the server's API key, if it requires one")
    add_data_option(parser)


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the folder of images, which is an error in one line if it was not built."""
    parser.add_argument(
        "--data",
        type=_data_folder,
        default=str(DEFAULT_FOLDER),  # argparse checks a default that is a text
        help=f"the folder of training.default_data (default: {DEFAULT_FOLDER})",
    )


def _data_folder(text: str) -> Path:
    if not (file := Path(text) / DATA).exists():
        raise argparse.ArgumentTypeError(f"{file} does not exist: build it with python -m training.default_data")
    return Path(text)


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """Yield a client of the server; if the server fails or none answers, the command ends with one line that says so."""
    try:
        client = Client(url, api_key=api_key)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    try:
        with client:
            yield client
    except FlamboyanceError as error:
        raise SystemExit(f"error: {_text(error)}") from None


def _text(error: FlamboyanceError) -> str:
    """Return the message of an error; the client's own advice is for code."""
    if isinstance(error, NotAuthorised):
        return f"{error.message}: pass --api-key"
    if isinstance(error, NotConnected):
        return f"{str(error).partition('. ')[0]}. Start a server there, or give the URL of another one."
    return str(error)
