"""Probabilities of candidates against sums computed by hand, and a bias of known size that calibration removes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.prompt import EncodedPrompt
from server.errors import ContextLengthExceeded
from server.fewshot.candidates import Candidate
from server.fewshot.classification import (
    InContext,
    bias,
    check_candidates,
    log_probabilities,
    scores,
    shot_orders,
    weigh,
)
from server.fewshot.methods.likeness import Array, log_softmax
from server.prompt import PreparedPrompt
from tests.server.fakes import served_model

RNG = np.random.default_rng(5)


def probabilities(query_scores: Array, content_free: Array | None = None) -> Array:
    return np.exp(log_probabilities(query_scores, content_free))


def test_scores_are_sums_or_means_of_tokens() -> None:
    logprobs = [[-1.0, -2.0, -3.0], [-4.0]]
    assert scores(logprobs, "sum").tolist() == [-6.0, -4.0]
    assert scores(logprobs, "mean").tolist() == [-2.0, -4.0]


def test_probabilities_sum_to_one_and_keep_odds() -> None:
    assert probabilities(np.log([[0.2, 0.1, 0.1]])) == pytest.approx([0.5, 0.25, 0.25])
    for size in (1, 2, 50, 1000):
        assert probabilities(RNG.normal(scale=50, size=(3, size))).sum() == pytest.approx(1.0, abs=1e-12)


def test_very_unlikely_candidates_do_not_underflow() -> None:
    query_scores = np.array([[-5000.0, -5001.0]])
    assert probabilities(query_scores) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    calibrated = probabilities(query_scores, np.array([[[-9000.0, -8000.0]]]))
    assert np.isfinite(calibrated).all()
    assert calibrated.argmax() == 0


def test_orders_are_averaged_in_logs() -> None:
    query_scores = np.log([[0.9, 0.1], [0.2, 0.8]])
    product = np.sqrt([0.9 * 0.2, 0.1 * 0.8])
    assert probabilities(query_scores) == pytest.approx(product / product.sum())


@pytest.mark.parametrize("factor", [1.5, 4.0, 100.0])
def test_calibration_removes_an_inflated_prior(factor: float) -> None:
    """The model's probabilities are truth times bias, and content-free queries measure only the bias."""
    truth = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    inflation = np.array([1.0, factor, 1.0])
    biased_scores = np.log(truth * inflation)
    content_free = np.log([inflation / 3])
    for row, right in zip(biased_scores, truth, strict=True):
        assert probabilities(row[None], content_free[None]) == pytest.approx(right)
        assert probabilities(row[None])[1] > right[1]
    biased = [int(probabilities(row[None]).argmax()) for row in biased_scores]
    calibrated = [int(probabilities(row[None], content_free[None]).argmax()) for row in biased_scores]
    assert calibrated == [0, 2, 1]
    assert factor < 4 or biased == [1, 1, 1]


def test_each_order_is_calibrated_by_its_own_bias() -> None:
    """The last shot's label is favoured, a different one in each order; calibration removes both biases."""
    truth = np.array([0.6, 0.4])
    inflation = np.array([[8.0, 1.0], [1.0, 3.0]])
    query_scores, content_free = np.log(truth * inflation), np.log(inflation)[:, None]
    assert probabilities(query_scores, content_free) == pytest.approx(truth)
    assert probabilities(query_scores[:1], content_free[1:]) != pytest.approx(truth)


def test_calibration_divides_by_the_bias_and_normalises() -> None:
    query_scores, content_free = RNG.normal(size=(1, 6)), RNG.normal(size=(1, 3, 6))

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(-1, keepdims=True)

    weights = 1 / softmax(content_free[0]).mean(0)
    expected = softmax(query_scores[0]) * weights
    assert probabilities(query_scores, content_free) == pytest.approx(expected / expected.sum())


def test_calibration_ignores_constants_added_to_all_scores() -> None:
    """A constant added to the scores of all candidates is no bias."""
    query_scores, content_free = RNG.normal(size=(2, 4)), RNG.normal(size=(2, 2, 4))
    moved = probabilities(query_scores + 7, content_free - [[[3.0], [5.0]]])
    assert moved == pytest.approx(probabilities(query_scores, content_free))


def test_the_bias_is_the_mean_of_probabilities() -> None:
    content_free = np.log([[0.8, 0.2], [0.4, 0.6]])
    assert np.exp(bias(content_free)) == pytest.approx([0.6, 0.4])
    assert np.exp(log_softmax(content_free)).sum(-1) == pytest.approx([1, 1])


def test_ranking_keeps_the_order_of_equals() -> None:
    candidates = [Candidate(str(index), "") for index in range(4)]
    ranked = weigh(candidates, None, {"knn": np.log([0.2, 0.4, 0.2, 0.2])}, 1.0)
    assert [candidate.label for candidate in ranked] == ["1", "0", "2", "3"]


def test_the_log_probabilities_of_all_parts_are_added() -> None:
    in_context = InContext(
        log_probabilities=np.log([0.5, 0.5]), sums=np.array([-3.0, -4.0]), num_tokens=[1, 2], num_orders=1
    )
    first, second = weigh([Candidate("a", "x"), Candidate("b", "y")], in_context, {"knn": np.log([0.2, 0.8])}, 1.0)
    assert (first.label, first.logprob, first.num_tokens) == ("b", -4.0, 2)
    assert first.scores == {"in_context": pytest.approx(math.log(0.5)), "knn": pytest.approx(math.log(0.8))}
    assert [first.probability, second.probability] == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("num_shots", [0, 1, 2, 3, 6, 7, 32])
@pytest.mark.parametrize("count", [1, 2, 6, 24])
def test_orders_are_distinct_and_begin_with_the_original(num_shots: int, count: int) -> None:
    orders = shot_orders(num_shots, count, seed=3)
    assert orders[0] == tuple(range(num_shots))
    assert len(set(orders)) == len(orders) == min(count, math.factorial(num_shots))
    assert all(sorted(order) == list(range(num_shots)) for order in orders)
    assert orders == shot_orders(num_shots, count, seed=3)


def test_another_seed_gives_other_orders() -> None:
    assert shot_orders(8, 6, seed=0) != shot_orders(8, 6, seed=1)


def test_fewer_orders_of_many_shots_are_the_first_of_more() -> None:
    assert shot_orders(8, 3, seed=2) == shot_orders(8, 6, seed=2)[:3]


@pytest.mark.parametrize(("num_left", "param"), [(1, "candidates[0]"), (0, "query")])
def test_a_prompt_without_room_for_a_candidate_is_named_by_its_own_path(num_left: int, param: str) -> None:
    model = served_model()
    num_tokens = model.max_model_len - num_left
    encoded = EncodedPrompt(token_ids=[5] * num_tokens, media_index=[-1] * num_tokens, media=[])
    with pytest.raises(ContextLengthExceeded) as refusal:
        check_candidates([PreparedPrompt(encoded, {}, [], "query")], [[5, 5]], ["candidates[0]"], model)
    assert refusal.value.param == param
