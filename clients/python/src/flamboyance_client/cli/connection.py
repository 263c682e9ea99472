"""Parts of every command: the options of the server, one line for an error, and JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer

from flamboyance_client.client import Client
from flamboyance_client.connection import BASE_URL, reached_hint, shown_url
from flamboyance_client.errors import ApiError, FlamboyanceError, NotConnected, TimedOut
from flamboyance_client.folders import UnreadableFiles
from flamboyance_client.uploads import UNREADABLE

Url = Annotated[str, typer.Option("--url", envvar="FLAMBOYANCE_URL", help="The URL of the server.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="FLAMBOYANCE_API_KEY", show_default=False, help="The key of the server."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

DEFAULT_URL = BASE_URL
NO_HINTS: Mapping[str, str] = {}


@contextmanager
def connected(url: str, api_key: str | None, hints: Mapping[str, str] = NO_HINTS) -> Iterator[Client]:
    """Yield a client. An error of the client or of a file becomes one line on stderr and the exit status 1.

    `hints` has what to do, by the code of the server's error; files that cannot be read have that of `UNREADABLE`.
    """
    try:
        with Client(url, api_key=api_key) as client:
            yield client
    except BrokenPipeError:
        raise
    except (FlamboyanceError, OSError, ValueError, ImportError) as error:  # httpx imports what a SOCKS proxy needs
        raise failure(message_of(error, url, hints)) from None


def failure(message: str) -> typer.Exit:
    """Print an error and return the exit that ends the command."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(1)


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def print_json(document: Any) -> None:
    """Print a document on a line of its own."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")
    print(json.dumps(document, ensure_ascii=not is_utf8), flush=True)


def message_of(error: Exception, url: str, hints: Mapping[str, str] = NO_HINTS) -> str:
    """Return the message of an error for the command line, which has no methods to call."""
    if isinstance(error, NotConnected) and _is_of_server(cause := error.__cause__):
        start = "start one with `flamboyance serve`, or give the URL of another with --url or FLAMBOYANCE_URL"
        return f"no server at {shown_url(url)} ({str(cause) or type(cause).__name__}): {start}"
    if isinstance(error, TimedOut):
        return f"no reply from {shown_url(url)} in time: the server may be overloaded, or it hangs; see its log"
    if isinstance(error, ApiError):
        return _server_message(error, hints)
    if isinstance(error, UnreadableFiles) and (hint := hints.get(UNREADABLE)):
        return f"{error}: {hint}"
    if isinstance(error, OSError) and error.filename is not None:
        return _file_message(error)
    return str(error) or type(error).__name__


def _is_of_server(cause: BaseException | None) -> bool:
    """Return whether no server was reached, rather than a proxy or a server without TLS."""
    if not isinstance(cause, httpx.RequestError) or isinstance(cause, httpx.PoolTimeout):
        return False
    return reached_hint(cause) is None


def _file_message(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no file or folder {error.filename!r}"
    if isinstance(error, IsADirectoryError):
        return f"{error.filename!r} is a folder; a file is needed"
    return f"{error.filename!r}: {error.strerror}"


def _server_message(error: ApiError, hints: Mapping[str, str]) -> str:
    """Return the message of the server, without the library's advice, which is about methods."""
    message = error.message if error.status is None else f"{error.status}: {error.message}"
    if error.status == 401 or error.code == "permission_denied":
        return f"{message} (--api-key or FLAMBOYANCE_API_KEY)"
    if hint := hints.get(str(error.code)):
        return f"{message}: {hint}"
    if error.param is not None and error.param not in error.message:
        return f"{message} ({error.param})"
    return message
