"""The tile table against a plain loop, and the lists of tiles per page against the table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import tiles
from kernels.tiles import tile_records, tiles_of_pages

KEYS = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 40)), min_size=1, max_size=8)


def expand(runs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([key for key, length in runs for _ in range(length)], dtype=torch.int32)


def by_loop(keys: list[int], rows: int) -> list[list[int]]:
    records, first = [], 0
    while first < len(keys):
        end = first
        while end < len(keys) and keys[end] == keys[first] and end - first < rows:
            end += 1
        records.append([first, end - first, keys[first], 0])
        first = end
    return records


@given(KEYS, st.sampled_from([1, 5, 16]))
def test_runs_are_cut_where_a_loop_would_cut_them(runs: list[tuple[int, int]], rows: int) -> None:
    keys = expand(runs)
    records = tile_records(keys, rows)
    assert records.dtype == torch.int32
    assert records.tolist() == by_loop(keys.tolist(), rows)


@given(KEYS, st.sampled_from([1, 5, 16]))
def test_a_device_has_the_same_tiles_among_empty_ones(runs: list[tuple[int, int]], rows: int) -> None:
    keys = expand(runs)
    records = tiles._tile_per_row(keys[:, None], rows)
    assert len(records) == len(keys)
    assert torch.equal(records[records[:, 1] > 0], tile_records(keys, rows))


@given(KEYS)
def test_lists_of_pages_differ_by_any_entry(runs: list[tuple[int, int]]) -> None:
    keys = expand(runs)
    lists = torch.stack([torch.full_like(keys, 7), keys], 1)
    of_lists, of_keys = tile_records(lists, 16), tile_records(keys, 16)
    assert torch.equal(of_lists[:, :2], of_keys[:, :2])
    assert (of_lists[:, 2] == 7).all()


@given(KEYS)
def test_every_page_lists_the_tiles_that_read_it(runs: list[tuple[int, int]]) -> None:
    keys = expand(runs)
    records = tile_records(keys, 16)
    starts, listed = tiles_of_pages(records, keys, 4)
    for page in range(4):
        expected = [i for i, record in enumerate(records.tolist()) if record[2] == page]
        assert listed[starts[page] : starts[page + 1]].tolist() == expected


def test_a_page_named_twice_is_listed_twice_and_an_empty_tile_is_not_listed() -> None:
    slots = torch.tensor([[1, 1], [0, -1]], dtype=torch.int32)
    records = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.int32)
    starts, listed = tiles_of_pages(records, slots, 2)
    assert starts.tolist() == [0, 1, 3]
    assert listed[:3].tolist() == [2, 0, 0]


@pytest.mark.parametrize("rows", [1, 16])
def test_no_rows_give_no_tiles(rows: int) -> None:
    assert tile_records(torch.zeros(0, dtype=torch.int32), rows).shape == (0, 4)
