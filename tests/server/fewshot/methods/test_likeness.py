"""Methods by likeness against scikit-learn's, on vectors of known classes; and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from model.likeness import Vectors
from server.fewshot.methods import METHODS, load_method
from server.fewshot.methods.likeness import (
    CHOICE_FOLDS,
    KEPT,
    MAX_FOLDS,
    SCALE,
    Array,
    Fitted,
    Labelled,
    best_method,
    folds,
    left_out_log_probabilities,
    log_softmax,
)
from server.fewshot.methods.linear import STRENGTH
from server.fewshot.methods.nearest import NUM_NEIGHBOURS, NearestNeighbours

WIDTH = 24


def unit(vectors: np.ndarray) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def examples(num_labels: int, per_label: int, noise: float, seed: int = 0) -> Labelled:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_labels), per_label)
    centres = np.random.default_rng(num_labels).standard_normal((num_labels, WIDTH))
    return Labelled(unit(centres[labels] + noise * rng.standard_normal((len(labels), WIDTH))), labels, num_labels)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_log_probabilities_sum_to_one_and_find_the_label(name: str, num_labels: int) -> None:
    logs = (
        load_method(name)
        .fit(examples(num_labels, 4, 0.3))
        .log_probabilities((queries := examples(num_labels, 8, 0.3, seed=1)).vectors)
    )
    assert np.exp(logs).sum(1) == pytest.approx(np.ones(len(logs)))
    assert (logs.argmax(1) == queries.labels).mean() > 0.9


def test_the_nearest_mean_is_that_of_scikit_learn() -> None:
    labelled, queries = examples(5, 3, 1.5), examples(5, 20, 1.5, seed=1).vectors
    means = unit(np.stack([labelled.vectors[labelled.labels == label].mean(0) for label in range(5)]))
    nearest = KNeighborsClassifier(1).fit(means, range(5))
    predicted = load_method("nearest_mean").fit(labelled).log_probabilities(queries).argmax(1)
    assert predicted.tolist() == nearest.predict(queries).tolist()


def test_the_linear_head_has_the_probabilities_of_scikit_learn() -> None:
    for num_labels in (2, 4):
        labelled, queries = examples(num_labels, 6, 1.0), examples(num_labels, 5, 1.0, seed=1).vectors
        regression = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
        expected = regression.fit(labelled.vectors, labelled.labels).predict_proba(queries)
        logs = load_method("linear").fit(labelled).log_probabilities(queries)
        assert np.exp(logs) == pytest.approx(expected, abs=1e-3)


def test_the_nearest_neighbours_of_each_label_are_those_of_scikit_learn() -> None:
    labelled, queries = examples(3, 2 * NUM_NEIGHBOURS, 1.5), examples(3, 5, 1.5, seed=1).vectors
    similarities = []
    for label in range(3):
        search = NearestNeighbors(n_neighbors=NUM_NEIGHBOURS, metric="cosine")
        distances, _ = search.fit(labelled.vectors[labelled.labels == label]).kneighbors(queries)
        similarities.append(1 - distances.mean(1))
    expected = log_softmax(SCALE * np.stack(similarities, axis=1))
    assert load_method("knn").fit(labelled).log_probabilities(queries) == pytest.approx(expected, abs=1e-3)


def test_a_label_with_many_examples_has_no_advantage_among_neighbours() -> None:
    vectors = unit(np.array([[1, 0.1, 0], [0, 1, 0.3], [0, 1, 0.4], [0, 1, 0.5], [0, 1, 0.6]]))
    fitted = NearestNeighbours().fit(Labelled(vectors, np.array([0, 1, 1, 1, 1]), 2))
    assert fitted.num_neighbours == 1
    logs = fitted.log_probabilities(unit(np.array([[1, 0.5, 0]])))
    assert logs.argmax() == 0


class Remembering:
    """A method that knows the labels of the vectors that it was fitted to, and answers wrongly for all others."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def fit(self, labelled: Labelled) -> Fitted:
        self.sizes.append(len(labelled.vectors))
        known = {vector.tobytes(): int(label) for vector, label in zip(labelled.vectors, labelled.labels, strict=True)}

        class Answers:
            def log_probabilities(self, queries: Vectors) -> Array:
                labels = [known.get(query.tobytes(), labelled.num_labels - 1) for query in queries]
                return np.log(0.8 * np.eye(labelled.num_labels)[labels] + 0.2 / labelled.num_labels)

            def parameters(self) -> Mapping[str, Array]:
                raise NotImplementedError

        return Answers()

    def restore(self, parameters: Mapping[str, Array], labelled: Labelled) -> Fitted:
        raise NotImplementedError


@pytest.mark.parametrize("per_label", [2, 11, 40])
def test_a_left_out_example_is_never_known(per_label: int) -> None:
    labelled, method = examples(3, per_label, 0.5), Remembering()
    logs = left_out_log_probabilities(method, labelled)
    assert (logs.argmax(1) == labelled.labels).mean() == pytest.approx(1 / 3)
    assert len(method.sizes) == min(per_label, MAX_FOLDS)
    assert sum(len(labelled.vectors) - size for size in method.sizes) == len(labelled.vectors)


@pytest.mark.parametrize(("per_label", "num_fits"), [(4, 4), (11, CHOICE_FOLDS), (40, CHOICE_FOLDS)])
def test_a_choice_fits_few_times(per_label: int, num_fits: int) -> None:
    labelled, method = examples(3, per_label, 0.5), Remembering()
    left_out_log_probabilities(method, labelled, CHOICE_FOLDS)
    assert len(method.sizes) == num_fits


def test_a_fold_has_one_example_of_each_label() -> None:
    labels = np.array([0, 1, 0, 2, 1, 2, 0, 1, 2])
    fold_of = folds(labels)
    assert [sorted(labels[fold_of == fold].tolist()) for fold in range(3)] == [[0, 1, 2]] * 3
    assert fold_of.max() == 2


def test_folds_keep_the_shares_of_labels_of_different_sizes() -> None:
    labels = np.repeat([0, 1, 2], [40, 4, 1])
    fold_of = folds(labels, 10)
    assert np.bincount(fold_of[:-1]).tolist() == [5, 5, 5, 5, 4, 4, 4, 4, 4, 4]
    assert fold_of[-1] == KEPT, "nothing of its label would be left"
    assert all(np.bincount(labels[fold_of == fold], minlength=3)[1] <= 1 for fold in range(10))


def test_the_only_example_of_a_label_is_never_left_out() -> None:
    assert folds(np.array([2, 0, 1])).tolist() == [KEPT] * 3
    few = examples(3, 4, 0.5)
    is_kept = (few.labels != 2) | (np.cumsum(few.labels == 2) == 1)
    labelled, method = few.without(~is_kept), Remembering()
    logs = left_out_log_probabilities(method, labelled)
    assert np.isnan(logs).all(1).tolist() == (labelled.labels == 2).tolist()
    assert sorted(method.sizes) == [len(labelled.labels) - 2] * 4, "one of each other label is left out"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_not_seem_worse_than_chance_on_random_vectors(name: str) -> None:
    """Left out alone, an example's label has fewer neighbours than the others, and a random guess is wrong too often."""
    rng = np.random.default_rng(0)
    accuracies = []
    for _ in range(60):
        vectors = unit(rng.standard_normal((20, WIDTH)))
        labelled = Labelled(vectors, np.repeat(np.arange(5), 4), 5)
        logs = left_out_log_probabilities(load_method(name), labelled)
        accuracies.append((logs.argmax(1) == labelled.labels).mean())
    assert np.mean(accuracies) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_fewer_coordinates_give_the_same_answers(name: str) -> None:
    labelled = examples(3, 5, 1.0)
    compact = labelled.compact()
    assert (labelled.vectors.shape, compact.vectors.shape) == ((15, WIDTH), (15, 15))
    assert compact.vectors @ compact.vectors.T == pytest.approx(labelled.vectors @ labelled.vectors.T, abs=1e-6)
    logs = [load_method(name).fit(same).log_probabilities(same.vectors) for same in (labelled, compact)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)
    many = examples(3, 10, 1.0)
    assert many.compact() is many


def test_the_expected_method_is_the_best_unless_another_one_is_clearly_better() -> None:
    for counts, best in (((4, 2), "second"), ((6, 2), "first"), ((2, 6), "second")):
        is_first = np.repeat([True, False], counts)
        assert best_method({"first": is_first, "second": ~is_first}, "second") == best
