"""A folder of images, a set that is made of it, and the environment of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from flamboyance_client import Client
from tests.clients.serving import KEY

COLOURS = ("blue", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "cli-colours"
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for width in (23, 25):
            Image.new("RGB", (width, 7), colour).save(folder / colour / f"{width}.png")
    return folder


@pytest.fixture(autouse=True)
def environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_URL", url)
    monkeypatch.setenv("FLAMBOYANCE_API_KEY", KEY)
    # the server runs in this process; a handler that another test has left would report its closed stream on stderr
    monkeypatch.setattr("logging.raiseExceptions", False)


@pytest.fixture
def made(folder: Path, url: str) -> Iterator[Client]:
    """A client of a server that has the set of the folder."""
    with Client(url, api_key=KEY) as client:
        client.support_sets.from_folder(folder)
        yield client
