"""The options of the commands that measure a running server."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.default_data.records import DEFAULT_FOLDER


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the server and for the images of its queries."""
    parser.add_argument("url", help="the server's URL, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="the server's API key, if it requires one")
    parser.add_argument(
        "--data",
        type=Path,
        default=DEFAULT_FOLDER,
        help=f"the folder of training.default_data (default: {DEFAULT_FOLDER})",
    )
