"""The application `flamboyance-client`. Each of its commands is also one of `flamboyance`, if both are installed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from flamboyance_client.cli import support_sets
from flamboyance_client.cli.ask import ask
from flamboyance_client.cli.classify import classify
from flamboyance_client.cli.connection import message_of

# of the message about a value that a literal does not have
TYPERS_PREFIX = "Value error, "

app = typer.Typer(
    help="Ask a Flamboyance server about images, and keep support sets on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print("flamboyance-client", metadata.version("flamboyance-client"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(ask)
app.command()(classify)
app.add_typer(support_sets.app, name="support-set")


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; an error of the command line is one line on stderr.

    Without a command, there is help in place of an error. Characters that the encoding of stdout does not have are escaped.
    """
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(args=list(arguments), prog_name="flamboyance-client", standalone_mode=False)
    except typer.TyperException as error:
        if message := error.format_message():
            print(f"error: {message.replace(TYPERS_PREFIX, '', 1)}", file=sys.stderr)
        return error.exit_code
    except typer.Abort:
        return 1
    except OSError as error:
        print(f"error: {message_of(error, '')}", file=sys.stderr)
        status = 1
    return _written(status if isinstance(status, int) else 0)


def _open_missing_streams() -> None:
    """Open the null device in place of streams that were closed when the process started."""
    # in the order of the descriptors, each of which is the lowest that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it is open until the end


def _written(status: int) -> int:
    """Write the rest of the output and return the exit status, which is not 0 if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # at its end Python would write it again, and fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if status == 0 and not isinstance(error, BrokenPipeError):
            print(f"error: {message_of(error, '')}", file=sys.stderr)
        return status or 1
    return status
