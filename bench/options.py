"""What every benchmark may be told: which model, in which numbers, on how many threads, and any setting of the server.

`--quick` means toy sizes: it shows that a benchmark runs, not how fast anything is. A flag that is given still wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bench import random_models
from model.zoo.default import prepare
from server.settings import Settings

KNOWN = ", ".join(random_models.SIZES)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """`quick` holds the toy sizes by option."""
    add_common(parser)
    if parser.parse_args(arguments).quick:
        # one thread: with more, a toy on a busy machine does little but wait at barriers
        parser.set_defaults(threads=1, **quick)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=None, help="threads of a model (default: torch's choice)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3); medians are shown")
    parser.add_argument("--quick", action="store_true", help="toy sizes: that it runs, not how fast")
    parser.add_argument(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="settings of the server, by their names in its YAML file",
    )


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--model", default=default, help=f"a folder, 'default', or random weights: {KNOWN} (default: {default})"
    )


def model_folder(name: str) -> Path:
    if name == "default":
        return prepare()
    return random_models.folder(name) if name in random_models.SIZES else Path(name)


def server_settings(options: argparse.Namespace, folder: Path, **values: Any) -> Settings:
    """The engine in this process and the server in another read the same settings, so they are the same engine."""
    given = {"model": str(folder), "num_threads": torch.get_num_threads(), **values, **dict(options.settings)}
    return Settings.model_validate(given)


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """For the head of a table."""
    values = {**vars(options), "settings": dict(options.settings) or None}
    return {name.replace("_", " "): value for name, value in values.items() if value is not None}


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, yaml.safe_load(value)
