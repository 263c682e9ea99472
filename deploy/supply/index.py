"""Reads data about projects from pip's configured package index, by the simple API in JSON (PEP 700)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

JSON = "application/vnd.pypi.simple.v1+json"
# concurrent requests to an index
NUM_CONNECTIONS = 4


def read_projects(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the index's answers about projects, in the order of their names."""
    url = index_url()
    with (
        httpx.Client(headers={"Accept": JSON}, timeout=60, follow_redirects=True) as http,
        ThreadPoolExecutor(NUM_CONNECTIONS) as threads,
    ):
        answers = list(threads.map(lambda name: http.get(f"{url}/{name}/").raise_for_status(), names))
    return [answer.json() for answer in answers]


def index_url() -> str:
    """Return the URL of pip's configured index, which its help shows."""
    # with the whole environment: the URL of the index may have a user
    command = ["env", "COLUMNS=1000", sys.executable, "-m", "pip", "install", "--help"]
    text = subprocess.check_output(command, text=True)
    (url,) = re.findall(r"--index-url <url>.*?\(default (\S+)\)", text, flags=re.DOTALL)
    return str(url).rstrip("/")


def version_of(filename: str) -> Version | None:
    """Return the version in the name of a file; None if the name does not have the standard form."""
    try:
        parse = parse_wheel_filename if filename.endswith(".whl") else parse_sdist_filename
        return parse(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None
