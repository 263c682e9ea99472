"""Prepare the default model and print its folder: `python -m model.zoo prepare [--cache DIR]`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from model.zoo.default import prepare
from model.zoo.fetch import DefaultModelError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "prepare", help="download and convert the default model unless its folder exists; print the folder"
    )
    command.add_argument("--cache", type=Path, help="folder of model folders (default: ~/.cache/flamboyance)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(prepare(parser.parse_args().cache))
    except DefaultModelError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
