"""The estimate of decode steps: its floors are those computed by hand, and its bytes those of the weights and caches."""

from __future__ import annotations

import pytest

from bench.floors import (
    BANDWIDTH,
    FLOPS,
    MEDIA_KERNEL,
    PAGED_KERNELS,
    PRODUCTS,
    costs_of,
    floor_seconds,
    node_seconds,
)
from bench.nodes import count_nodes
from bench.published_models import PUBLISHED, SPECS


@pytest.mark.parametrize(
    ("name", "single", "batch"), [("OF-3B", 1.51, 1.66), ("OF-9B", 5.34, 5.58), ("IDEFICS-9B", 5.48, 5.88)]
)
def test_the_floors_of_1_and_of_64_sequences_in_milliseconds(name: str, single: float, batch: float) -> None:
    assert [round(1e3 * floor_seconds(SPECS[name], number), 2) for number in (1, 64)] == pytest.approx(
        [single, batch], abs=0.011
    )


@pytest.mark.parametrize("num_sequences", [1, 64])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bytes_of_all_nodes_are_those_of_the_floor_and_some_for_activations(name: str, num_sequences: int) -> None:
    """Two counts that share nothing: one of the tensors of every node, one of the model's parameters."""
    spec, works = SPECS[name], costs_of(name, num_sequences).works
    assert works.keys() >= {MEDIA_KERNEL, *PAGED_KERNELS}
    weights = 2.0 * spec.step_params
    text = (960 + 20 * num_sequences) * spec.text_bytes
    least = weights + text + num_sequences * spec.media_bytes
    assert least < sum(work.num_bytes for work in works.values()) < 1.2 * least
    products = 2.0 * spec.step_params * num_sequences
    assert sum(works[name].flops for name in PRODUCTS if name in works) == pytest.approx(products, rel=0.01)


def test_every_node_of_a_step_takes_a_part_of_the_estimate() -> None:
    nodes, works = count_nodes(PUBLISHED["OF-3B"], 1), costs_of("OF-3B", 1).works
    assert {name: work.nodes for name, work in works.items()} == {**nodes.operators, **nodes.kernels}


def test_rows_that_share_their_shots_read_again_the_part_in_which_they_differ() -> None:
    """Four tiles of 16 rows read 3 parts of 256 tokens, and each of the 64 sequences the part in which its query begins."""
    attend = costs_of("OF-9B", 64).works[PAGED_KERNELS[0]]
    spec = SPECS["OF-9B"]
    token = 2 * spec.dim * 2
    assert attend.repeated == spec.num_layers * token * (4 * 768 + 64 * (980 - 768) - (960 + 64 * 20))


def test_a_node_takes_its_launch_and_its_bytes_or_flops() -> None:
    launch = node_seconds(0.0, 0.0)
    assert node_seconds(BANDWIDTH.value, 0.0) == pytest.approx(1.0 + launch)
    assert node_seconds(BANDWIDTH.value, 3 * FLOPS.value) == pytest.approx(3.0 + launch)
