"""`auto` without an evaluation: the method that the model's prior expects, unless another one is clearly better.

And the memory of what was fitted: it has no texts of requests.
"""

from __future__ import annotations

import gc
import multiprocessing
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from model.prior import Prior
from server.fewshot.comparison import ComparedExamples, Comparison
from server.fewshot.methods import METHODS
from server.fewshot.methods.likeness import Labelled
from tests.server.colours import IMAGES, QUERY, app, settings, url

__all__ = ["app", "settings"]  # fixtures

LINEAR = Prior({1: "nearest_mean", 3: "linear"})


def labelled(groups: dict[int, list[tuple[float, float]]], noise: float = 0.02) -> Labelled:
    """Return the vectors of each label near its points, of length one."""
    rng = np.random.default_rng(0)
    points = np.array([point for members in groups.values() for point in members])
    vectors = np.concatenate([points, np.zeros((len(points), 6))], axis=1) + noise * rng.standard_normal(
        (len(points), 8)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Labelled(vectors.astype(np.float32), np.repeat([*groups], [*map(len, groups.values())]), len(groups))


def test_methods_that_are_equally_accurate_leave_the_expected_one() -> None:
    easy = {0: [(1.0, 0.0)] * 4, 1: [(0.0, 1.0)] * 4}
    assert ComparedExamples(labelled(easy), LINEAR).choose_method() == "linear"
    assert ComparedExamples(labelled(easy), Prior({1: "knn"})).choose_method() == "knn"


def test_the_expected_method_depends_on_the_examples_per_label() -> None:
    few = {0: [(1.0, 0.0)] * 2, 1: [(0.0, 1.0)] * 2}
    assert ComparedExamples(labelled(few), LINEAR).choose_method() == "nearest_mean"


def test_a_label_with_a_single_example_leaves_the_expected_method() -> None:
    single = {0: [(1.0, 0.0)], 1: [(0.0, 1.0)] * 6}
    assert ComparedExamples(labelled(single), LINEAR).choose_method() == "linear"
    assert ComparedExamples(labelled(single)).choose_method() == "nearest_mean"


@pytest.mark.parametrize("per_group", [8, 16])
def test_a_method_that_is_clearly_better_takes_its_place(per_group: int) -> None:
    """The mean of a label with two opposite groups is near neither of them."""
    groups = {0: [(1.0, 0.0), (-1.0, 0.0)] * per_group, 1: [(0.0, 1.0), (0.0, -1.0)] * per_group}
    assert ComparedExamples(labelled(groups)).choose_method() == "knn"


LONG = "x" * 10_000
RED, BLUE = IMAGES[0], IMAGES[2]
WARM, COLD = {"image": url(RED), "label": "warm"}, {"image": url(BLUE), "label": "cold"}


@pytest.mark.anyio
@pytest.mark.parametrize("is_stored", [False, True])
async def test_texts_that_differ_share_a_fit_that_does_not_keep_them(
    http: httpx.AsyncClient, app: FastAPI, is_stored: bool
) -> None:
    comparison: Comparison = app.state.services.comparison
    examples = [WARM, COLD, {"image": url(RED), "text": f"{LONG} stored"}]
    await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})

    async def classify(number: int, candidates: Sequence[Any]) -> str:
        shots = [WARM, COLD, {"image": url(RED), "text": f"{LONG} {number}"}]
        source: dict[str, Any] = {"examples": {"support_set": "pets"}} if is_stored else {"shots": shots}
        body = {**source, "candidates": candidates, "query": {"image": url(QUERY)}, "method": "nearest_mean"}
        answer = await http.post("/v1/classify", json=body)
        assert answer.status_code == 200, answer.text
        label: str = answer.json()["label"]
        return label

    for number in range(3):
        texts = [{"label": label, "text": f"{label} {LONG[:900]} {number}"} for label in ("warm", "cold")]
        assert await classify(number, texts) == "warm"
    sized = comparison.recent._values._sized
    assert len(sized) == 1
    assert LONG[:100] not in str([*sized])
    assert await classify(0, ["cold", "warm"]) == "warm"
    assert len(sized) == 2  # the labels have other indices
    await http.delete("/v1/support_sets/pets")


def fitted(number: int, num_labels: int) -> ComparedExamples:
    """Return examples with the fits of all methods, and the confidence in them."""
    vectors = np.random.default_rng(0).standard_normal((number, 1024)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    examples = ComparedExamples(Labelled(vectors, np.arange(number) % num_labels, num_labels))
    for name in METHODS:
        examples.fit(name)
        examples.confidence(name)
    return examples


def measure_fits(number: int, num_labels: int) -> tuple[int, int]:
    """Return the bytes that the end of the fits frees, and the bytes that were counted for them."""
    tracemalloc.start()
    examples = fitted(number, num_labels)
    counted = examples.num_bytes
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    del examples
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return before - after, counted  # not what was allocated: the first fit imports modules, which stay


@pytest.fixture(scope="module")
def quiet_process() -> Iterator[ProcessPoolExecutor]:
    """Start a process that runs nothing else: threads of other tests allocate and free memory in this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield process


@pytest.mark.parametrize(("number", "num_labels"), [(4, 2), (32, 4), (64, 16), (1000, 10)])
def test_the_memory_of_fits_is_what_is_counted(
    quiet_process: ProcessPoolExecutor, number: int, num_labels: int
) -> None:
    freed, counted = quiet_process.submit(measure_fits, number, num_labels).result(timeout=120)
    assert freed <= counted <= 1.9 * freed
