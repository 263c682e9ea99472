"""Commands of other distributions: the entry points of the group `flamboyance.commands`.

The name of an entry point is the name of its command. Its value is a function, or a Typer application: one with a single
command becomes that command, any other a group of subcommands.
"""

from __future__ import annotations

import sys
from collections.abc import Container
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer

GROUP = "flamboyance.commands"


def add_plugins(app: typer.Typer, reserved: Container[str]) -> None:
    """Add the commands of all other distributions; one that cannot be added is reported in one line on stderr."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            if point.name in reserved:
                raise ValueError("this is the name of a command of flamboyance itself")
            _add(app, point.name, point.load())
        except Exception as error:
            print(_warning(point, error), file=sys.stderr)


def _add(app: typer.Typer, name: str, value: Any) -> None:
    if not isinstance(value, typer.Typer):
        if not callable(value):
            raise TypeError(f"expected a function or a Typer application, not {value!r}")
        app.command(name)(value)
    elif value.registered_callback or value.registered_groups or len(value.registered_commands) != 1:
        app.add_typer(value, name=name)
    else:
        (command,) = value.registered_commands
        command.name = name
        app.registered_commands.append(command)


def _warning(point: EntryPoint, error: Exception) -> str:
    distribution = point.dist.name if point.dist else "an unknown distribution"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"warning: the command {point.name!r} of {distribution} is not available: {reason}"
