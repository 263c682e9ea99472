"""Tests that compare a support set's estimates with fresh images, on a real server with a tiny model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from evaluation.leave_one_out import ImageSplit, Options, Server, compare
from flamboyance_client import Client
from tests.clients.serving import KEY, tiny_server

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200)}


def make_images(folder: Path, per_colour: int) -> list[tuple[str, str]]:
    """Write `per_colour` different images of each colour, and return their names and colours."""
    for shade in range(per_colour):
        for name, colour in COLOURS.items():
            Image.new("RGB", (8, 8), tuple(part + shade for part in colour)).save(folder / f"{name}-{shade}.png")
    return [(f"{name}-{shade}.png", name) for shade in range(per_colour) for name in COLOURS]


def test_each_setting_is_compared_on_fresh_images_and_the_set_is_deleted(tmp_path: Path) -> None:
    split = ImageSplit(make_images(tmp_path, 4)[:4], make_images(tmp_path, 4)[4:])
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
            methods=[],
            k=[1, 2],
            strategies=["random"],
            seeds=[3],
            calibration="none",
            normalisation="mean",
            permutations=1,
        )
        rows, followed = compare(Server(options, client), split)
        assert not client.support_sets.list().data
    assert {(row.name, row.k) for row in rows} == {
        *((method, None) for method in ("nearest_mean", "knn", "linear")),
        *((f"{method}, random", k) for method in ("in_context", "blend") for k in (1, 2)),
    }
    assert {(row.estimate.num_answers, row.truth.num_answers) for row in rows} == {(4, 4)}
    assert followed.truth is not None
    assert followed.best == max(row.truth.value for row in rows) >= followed.truth
    assert followed.method in ("nearest_mean", "knn", "linear", "in_context", "blend")
    # any encoder tells red from blue
    assert followed.auto == 1.0
