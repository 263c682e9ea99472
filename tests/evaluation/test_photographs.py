"""Tests that planted wrong labels and suggestions are measured through a real server with a tiny model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import diagnostics, suggestions
from evaluation.intervals import Ratio
from evaluation.photographs import Photographs
from flamboyance_client import Client
from tests.clients.serving import KEY, tiny_server

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200), "green": (20, 200, 20)}
PER_COLOUR = 8


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with tiny_server(tmp_path_factory.mktemp("server")) as url, Client(url, api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def images(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("images")
    return {
        name: [
            _upload(client, folder / f"{name}-{shade}.png", tuple(part + shade for part in colour))
            for shade in range(PER_COLOUR)
        ]
        for name, colour in COLOURS.items()
    }


def _upload(client: Client, file: Path, colour: tuple[int, ...]) -> str:
    Image.new("RGB", (8, 8), colour).save(file)
    return client.images.upload(file).id


def separated(images: dict[str, list[str]]) -> Photographs:
    """Return the images with vectors in which a colour is an axis."""
    axes = np.eye(len(images), dtype=np.float32)
    vectors = {image: axis for axis, ids in zip(axes, images.values(), strict=True) for image in ids}
    return Photographs(images, vectors)


def test_a_tenth_of_the_labels_is_wrong_and_a_draw_can_be_repeated(images: dict[str, list[str]]) -> None:
    planted = diagnostics.plant(images, ways=2, per_label=5, num_fresh=2, number=0)
    assert planted == diagnostics.plant(images, ways=2, per_label=5, num_fresh=2, number=0)
    kinds = dict(planted.examples)
    assert (len(kinds), len(planted.wrong), len(planted.fresh)) == (10, 1, 4)
    assert all(kinds[image] != label for image, label in planted.wrong.items())
    assert not kinds.keys() & {image for image, _ in planted.fresh}
    labels = dict(planted.labelled(planted.wrong))
    assert sum(labels[image] != kind for image, kind in planted.examples) == 1
    assert len(planted.labelled({}, planted.wrong)) == 9


def test_wrong_labels_are_judged_and_the_sets_are_deleted(client: Client, images: dict[str, list[str]]) -> None:
    planted = diagnostics.plant(images, ways=2, per_label=5, num_fresh=2, number=1)
    outcome = diagnostics.judge(client, separated(images), planted)
    assert outcome.keys() == set(diagnostics.COLUMNS)
    # any encoder tells red from blue
    assert {outcome[column] for column in ("recall", "precision", "label")} == {(1, 1)}
    assert {outcome[column] for column in ("right labels", "named left out", "named corrected")} == {(4, 4)}
    assert not client.support_sets.list().data


def test_suggestions_are_compared_with_random_draws(client: Client, images: dict[str, list[str]]) -> None:
    options = Namespace(ways=3, pool=6, fresh=2)
    episode = suggestions.sample_episode(images, options, 1, 0)
    assert [len(part) for part in (episode.examples, episode.pool, episode.fresh)] == [3, 6, 6]
    assert len({image for part in (episode.examples, episode.pool, episode.fresh) for image, _ in part}) == 15
    picked = suggestions.suggested(client, episode, 2)
    assert len(picked) == 2
    assert set(picked) <= set(episode.pool)
    outcome = suggestions.judge(client, separated(images), episode, 2, 0)
    assert outcome == suggestions.Outcome(before=1.0, random=1.0, suggested=1.0)
    assert not client.support_sets.list().data


def test_the_interval_of_a_ratio_is_over_its_units() -> None:
    assert Ratio([(1, 2), (1, 2), (1, 2)]).interval() == (0.5, 0.5)
    ratio = Ratio([(0, 1), (2, 2), (3, 3), (1, 2)] * 10)
    assert ratio.value == 0.75
    assert 0.6 < ratio.interval()[0] < 0.7 < 0.8 < ratio.interval()[1] < 0.9
