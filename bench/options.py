"""The command-line options that all benchmarks share: the model, the number of threads, and any setting of the server.

`--quick` selects toy sizes: it shows that a benchmark runs, not how fast anything is. Explicit options still win.
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

RANDOM_MODELS = ", ".join(random_models.NAMES)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Parse the arguments and set torch's threads. `quick` maps options to their toy sizes."""
    add_common(parser)
    if parser.parse_args(arguments).quick:
        # One thread: with more, a toy model on a busy machine mostly waits at barriers.
        parser.set_defaults(threads=1, **quick)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, default=None, help="number of threads of a model (default: torch's choice)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds (default: 3); the table shows medians")
    parser.add_argument("--quick", action="store_true", help="use toy sizes, to check that the benchmark runs")
    parser.add_argument(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="settings of the server, with the names of its YAML file",
    )


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--model",
        default=default,
        help=f"a model folder, 'default', or random weights: {RANDOM_MODELS} (default: {default})",
    )


def model_folder(name: str) -> Path:
    if name == "default":
        return prepare()
    return random_models.folder(name) if name in random_models.NAMES else Path(name)


def server_settings(options: argparse.Namespace, folder: Path, **values: Any) -> Settings:
    """Return the settings of the server, which also configure an engine in this process in the same way."""
    fields = {"model": str(folder), "num_threads": torch.get_num_threads(), **values, **dict(options.settings)}
    return Settings.model_validate(fields)


def as_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as the settings at the head of a report."""
    values = {**vars(options), "settings": dict(options.settings) or None}
    return {name.replace("_", " "): value for name, value in values.items() if value is not None}


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, yaml.safe_load(value)
