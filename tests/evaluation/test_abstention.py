"""Tests of the evaluations of confidence: abstention on fresh images, and the temperatures that are fitted to them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evaluation import abstention, temperature
from evaluation.abstention import Sets
from evaluation.intervals import Share
from flamboyance_client import Client
from tests.clients.serving import KEY, tiny_server
from tests.evaluation.test_leave_one_out import make_images
from training.default_data.records import Record, read_records, write_records

SETS = Sets(domain="photograph", ways=2, shots=2, fresh=2, count=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of photographs in two categories that any encoder tells apart."""
    records = [
        Record(
            image=image,
            label="",
            category=colour,
            tags=(),
            source="",
            licence="",
            style="",
            domain="photograph",
            trains=False,
        )
        for image, colour in make_images(tmp_path, 4)
    ]
    write_records(tmp_path, records)
    return tmp_path


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with tiny_server(tmp_path) as url, Client(url, api_key=KEY) as connected:
        yield connected


def parsed(data: Path, *arguments: str) -> Namespace:
    parser = ArgumentParser()
    abstention.add_arguments(parser)
    return parser.parse_args(["http://server", "--data", str(data), *arguments])


def test_labels_that_are_given_are_counted_for_each_target(client: Client, data: Path) -> None:
    options = parsed(data)
    options.method, options.targets = "nearest_mean", [0.5]
    measured = abstention.measure(client, options, SETS)
    assert measured == {None: (Share(8, 8), 1.0), 0.5: (Share(8, 8), 1.0)}
    assert not client.support_sets.list().data


def test_the_same_sets_are_drawn_again_and_the_commands_draw_others(data: Path) -> None:
    records = read_records(data)
    first, again, other = (
        list(SETS.draw(records, seed)) for seed in (abstention.SEED, abstention.SEED, temperature.SEED)
    )
    assert first == again != other
    assert [len(split.examples) for split in first] == [len(split.fresh) for split in first] == [4, 4]


def test_each_size_of_a_set_is_a_row(data: Path) -> None:
    rows = list(abstention.all_sets(parsed(data, "--shots", "1", "5", "--domains", "drawing")))
    assert [row.name for row in rows] == ["drawings, 5-way, 1 per word", "drawings, 5-way, 5 per word"]


def test_a_cell_without_a_label_has_no_accuracy() -> None:
    assert abstention.cell(Share(0, 0), 0.0) == "-, 0.000"
    assert abstention.cell(Share(9, 10), 0.5) == "0.900 [0.596, 0.982], 0.500"


def test_the_margins_of_fresh_images_are_those_of_the_right_labels(client: Client, data: Path) -> None:
    rows = temperature.measure(client, parsed(data), SETS, ["nearest_mean", "knn"])
    for margins in rows.values():
        assert len(margins) == 8
        # the right label is the most likely one
        assert all(max(row) == 0.0 > min(row) for row in margins)


def test_the_temperature_with_the_least_surprise_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(4000, 3)) * 2
    odds = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    right = np.array([rng.choice(3, p=row) for row in odds])
    rows = (4 * (logs - logs[np.arange(4000), right][:, None])).tolist()
    assert temperature.best(rows)[0] == pytest.approx(4, rel=0.1)
    common = temperature.print_rows("knn", {"some": rows[:2000], "others": rows[2000:]})
    assert common == temperature.best(rows)[0]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| knn | all | {common:.2f} |")
