"""A support set's estimates beside fresh images, on a real server with a tiny model: what was asked is what is compared."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from evaluation.leave_one_out import Drawn, Options, Server, compare
from flamboyance_client import Client
from tests.clients.serving import KEY, tiny_server

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200)}


def pictures(folder: Path, number: int) -> list[tuple[str, str]]:
    """As many of each colour, no two alike."""
    for shade in range(number):
        for name, colour in COLOURS.items():
            Image.new("RGB", (8, 8), tuple(part + shade for part in colour)).save(folder / f"{name}-{shade}.png")
    return [(f"{name}-{shade}.png", name) for shade in range(number) for name in COLOURS]


def test_each_setting_is_compared_on_the_fresh_images_and_the_set_is_forgotten(tmp_path: Path) -> None:
    drawn = Drawn(pictures(tmp_path, 4)[:4], pictures(tmp_path, 4)[4:])
    with tiny_server(tmp_path) as url, Client(url, api_key=KEY) as client:
        options = Options(
            url=url,
            api_key=KEY,
            data=tmp_path,
            domain="drawing",
            sets=1,
            ways=2,
            examples=2,
            fresh=2,
            k=[1, 2],
            strategies=["random"],
            seeds=[3],
            calibration="none",
            normalisation="mean",
            permutations=1,
        )
        rows, followed = compare(Server(options, client), drawn)
        assert not client.support_sets.list().data
    assert {(row.strategy, row.k) for row in rows} >= {("random", 1), ("random", 2)}
    assert {(row.estimate.total, row.truth.total) for row in rows} == {(4, 4)}
    assert followed.best == max(row.truth.value for row in rows) >= followed.truth
    assert followed.k in {row.k for row in rows}
