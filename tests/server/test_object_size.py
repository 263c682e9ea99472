"""Tests that the size of an object has everything that it refers to, once."""

from __future__ import annotations

import json
import tracemalloc

from server.object_size import size_of


def test_many_lists_count_as_the_memory_that_they_take() -> None:
    text = json.dumps({"a": [[] for _ in range(4000)], "b": {str(number): number * 0.5 for number in range(500)}})
    tracemalloc.start()
    value = json.loads(text)
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory > 10 * len(text)
    assert 0.9 * memory < size_of(value) < 1.1 * memory


def test_an_object_counts_once() -> None:
    text = "x" * 1000
    twice: list[object] = [text, text, (text,)]
    twice.append(twice)
    assert size_of(text) < size_of(twice) < 1.5 * size_of(text)
