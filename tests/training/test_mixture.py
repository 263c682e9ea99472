"""Tests of a mixture's streams: every stream belongs to one process, whatever the number of processes."""

from __future__ import annotations

import pytest

from training.mixture import owned_streams


@pytest.mark.parametrize("num_processes", [1, 2, 3, 6])
def test_each_stream_belongs_to_one_process(num_processes: int) -> None:
    owned = [index for rank in range(num_processes) for index in owned_streams(6, rank, num_processes)]
    assert sorted(owned) == list(range(6))


def test_streams_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="4 streams cannot be divided evenly among 3 processes"):
        owned_streams(4, 0, 3)
