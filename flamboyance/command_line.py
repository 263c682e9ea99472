"""The command `flamboyance`: the programs of the application, and the commands of other distributions.

A program reads its own arguments, and is imported when it is called: the command itself loads no torch.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from errno import ENOSPC
from typing import Annotated, NamedTuple

import typer

from flamboyance.application import load
from flamboyance.plugins import add_plugins

NAME = "flamboyance"
# a distribution of its own, which not every program needs
CLIENT = "flamboyance_client"
INSTALL_CLIENT = "pip install ./clients/python"
# its commands, which are entry points of its distribution
CLIENT_COMMANDS = ("ask", "classify", "support-set")
# of the message about a value that a literal does not have
TYPERS_PREFIX = "Value error, "
# settings of a command that gets its arguments as they are
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class Program(NamedTuple):
    """A program of the application, `python -m MODULE`.

    Its module has `main(arguments, prog)`, which returns the exit status; `prog` is the command's name in usage messages.
    """

    module: str
    help: str
    prog: str
    first_arguments: tuple[str, ...] = ()

    def run(self, arguments: Sequence[str]) -> int:
        try:
            module = load(self.module)
        except ModuleNotFoundError as error:
            if error.name != CLIENT:
                raise
            return _without_client(self.prog)
        status: int = module.main([*self.first_arguments, *arguments], prog=self.prog)
        return status


def _without_client(prog: str) -> int:
    print(f"error: {prog} needs {CLIENT}: {INSTALL_CLIENT}", file=sys.stderr)
    return 1


PROGRAMS = {
    "serve": Program(
        "server.start",
        "Serve a model over HTTP: `flamboyance serve [MODEL] [--SETTING VALUE ...]`. "
        "Without a model, serve the default model.",
        prog=f"{NAME} serve",
    ),
    "describe": Program(
        "model.describe", "Count the parameters of a model folder or of the paper's models.", prog=f"{NAME} describe"
    ),
    "import": Program(
        "model.checkpoint.__main__",
        "Convert an OpenFlamingo or IDEFICS checkpoint to a model folder.",
        prog=NAME,
        first_arguments=("import",),
    ),
    "join": Program(
        "model.checkpoint.__main__",
        "Join a language model and a vision encoder to a model folder that is yet to be trained.",
        prog=NAME,
        first_arguments=("join",),
    ),
    "build": Program(
        "model.presets.__main__",
        "Build a model folder of one of the paper's models, with random or given experts, that is yet to be trained.",
        prog=NAME,
        first_arguments=("build",),
    ),
    "openapi": Program(
        "server.openapi",
        "Print the OpenAPI document of the HTTP API, for generators of clients.",
        prog=f"{NAME} openapi",
    ),
    "backup": Program(
        "server.store.__main__",
        "Write all that clients have stored to a file, also while the server runs.",
        prog=NAME,
        first_arguments=("backup",),
    ),
    "restore": Program(
        "server.store.__main__",
        "Restore a backup into an empty database, of any kind, and into the media store.",
        prog=NAME,
        first_arguments=("restore",),
    ),
    "keys": Program("server.access.__main__", "Make, list and revoke API keys of a server.", prog=f"{NAME} keys"),
    "evaluate": Program(
        "evaluation.benchmarks.__main__",
        "Evaluate a server on a benchmark of the paper: `flamboyance evaluate NAME --data DIR [--server URL]`.",
        prog=f"{NAME} evaluate",
    ),
}


def create_app() -> typer.Typer:
    """Return the application with the programs, without the commands of other distributions."""
    app = typer.Typer(
        name=NAME, help="The few-shot inference server for Flamingo-family models.", pretty_exceptions_enable=False
    )
    app.callback(invoke_without_command=True)(_options)
    for name, program in PROGRAMS.items():
        _add_program(app, name, program)
    return app


def _add_program(app: typer.Typer, name: str, program: Program) -> None:
    # the program also reads --help
    @app.command(name, help=program.help, context_settings=PASS_ON, add_help_option=False)
    def run(context: typer.Context) -> None:
        raise typer.Exit(program.run(context.args))


def _add_missing_client_commands(app: typer.Typer) -> None:
    """Add commands that say how to install the client, for those of its commands that no distribution has added."""
    present = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    for name in CLIENT_COMMANDS:
        if name not in present:
            _add_missing(app, name)


def _add_missing(app: typer.Typer, name: str) -> None:
    @app.command(name, help=f"Needs the client: {INSTALL_CLIENT}", context_settings=PASS_ON, add_help_option=False)
    def run() -> None:
        raise typer.Exit(_without_client(f"{NAME} {name}"))


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(NAME, load("server.version").VERSION)
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; an error of the command line is one line on stderr.

    A group without a command shows its help in place of an error.
    """
    _open_missing_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    app = create_app()
    if not arguments or arguments[0] not in {*PROGRAMS, "--version"}:
        add_plugins(app, reserved=PROGRAMS)
        _add_missing_client_commands(app)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # of a label or a file name that the encoding of stdout does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(args=list(arguments), prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        if message := error.format_message():
            print(f"error: {message.replace(TYPERS_PREFIX, '', 1)}", file=sys.stderr)
        return error.exit_code
    except typer.Abort:
        return 1
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        print(f"error: {error}", file=sys.stderr)
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
            print(f"error: {error}", file=sys.stderr)
        return status or 1
    return status
