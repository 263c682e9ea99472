"""Tests that media which have too many pixels for one request are sent in several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flamboyance_client import ApiError, BadRequest, Client, Retries
from flamboyance_client.cli.held_out import _unknown
from server.app import create_app
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.clients.python.test_uploads import picture
from tests.clients.serving import listening
from tests.server.fakes import FakeClient, served_model

# of a request; a picture has 63
MAX_PIXELS = 150


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Yield the client of a server on which two of the pictures fit into a request."""
    settings = Settings(data_dir=tmp_path / "data", max_request_pixels=MAX_PIXELS, decode_processes=1)
    app = create_app(FakeClient(), served_model(), settings, Metrics("tiny"))
    with listening(app) as url, Client(url, retries=Retries(limit=0)) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "colours"
    for name in ("red", "green", "blue", "teal", "grey"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(picture(name))
    return folder


def test_a_folder_of_large_pictures_is_a_set(client: Client, folder: Path) -> None:
    first = client.support_sets.from_folder(folder)
    assert (first.num_examples, first.raw["expires_at"]) == (5, None)
    for name in ("red", "green", "blue"):
        (folder / name / "2.png").write_bytes(picture(f"dark{name}"))
    changed = client.support_sets.from_folder(folder)
    assert (changed.id, changed.num_examples) == (first.id, 8)


@pytest.mark.parametrize("name", ["blue", "teal"])
def test_a_failure_of_a_later_part_leaves_no_set(client: Client, folder: Path, name: str) -> None:
    (folder / name / "1.png").write_bytes(picture("red")[:50])
    with pytest.raises(BadRequest, match=f"{folder / name / '1.png'}: .* damaged") as caught:
        client.support_sets.from_folder(folder)
    assert caught.value.code == "invalid_media"
    assert list(client.support_sets.list()) == []


@pytest.mark.parametrize("skip", [False, True])
def test_a_picture_that_alone_has_too_many_pixels_is_named(client: Client, folder: Path, skip: bool) -> None:
    (folder / "grey" / "1.png").write_bytes(picture("grey", width=50))
    if skip:
        assert [file.path for file in client.support_sets.from_folder(folder, skip_unreadable=True).skipped] == [
            str(folder / "grey" / "1.png")
        ]
        return
    with pytest.raises(ApiError, match=f"{folder / 'grey' / '1.png'}: .* have 350 pixels") as caught:
        client.support_sets.from_folder(folder)
    assert caught.value.code == "too_many_pixels"


def test_images_of_a_test_folder_are_compared_in_smaller_groups(tmp_path: Path) -> None:
    """A command asks the server which images of a folder the set has."""
    sent: list[int] = []

    def reply(request: httpx.Request) -> httpx.Response:
        pool = json.loads(request.content)["pool"]
        sent.append(len(pool))
        if len(pool) > 2:
            return httpx.Response(400, json={"error": {"message": "too many", "code": "too_many_pixels"}})
        return httpx.Response(200, json={"object": "list", "data": [], "known": [{"index": 0, "example": "a"}]})

    pool = [(tmp_path / f"{number}.png", "red") for number in range(5)]
    for path, _ in pool:
        path.write_bytes(picture("red"))
    with Client("http://server", transport=httpx.MockTransport(reply)) as client:
        queries = _unknown(client, "colours", pool)
    assert sent == [5, 2, 3, 1, 2]
    assert queries == [pool[1], pool[4]]
