"""A linear head: logistic regression on the vectors, regularised, by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from model.likeness import Vectors
from server.fewshot.methods.likeness import Array, Labelled, log_softmax

# inverse strength of the regularisation, for vectors of length one
STRENGTH = 30.0
MAX_ITERATIONS = 200


@dataclass(frozen=True, slots=True)
class Linear:
    """Logistic regression with balanced labels; for a single label there is nothing to fit."""

    def fit(self, labelled: Labelled) -> Head:
        width = labelled.vectors.shape[1]
        if labelled.num_labels == 1:
            return Head(np.zeros((1, width)), np.zeros(1))
        regression = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=MAX_ITERATIONS)
        # single precision would be slower: the solver needs more steps
        regression.fit(labelled.vectors.astype(np.float64), labelled.labels)
        weights, bias = regression.coef_, regression.intercept_
        if labelled.num_labels == 2:  # one row, for the second label
            weights, bias = np.concatenate([0 * weights, weights]), np.concatenate([0 * bias, bias])
        return Head(weights, bias)

    def restore(self, parameters: Mapping[str, Array], labelled: Labelled) -> Head:
        return Head(parameters["weights"], parameters["bias"])


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Weights [C, D] and biases [C]."""

    weights: Array
    bias: Array

    def log_probabilities(self, queries: Vectors) -> Array:
        return log_softmax(queries @ self.weights.T + self.bias)

    def parameters(self) -> Mapping[str, Array]:
        return {"weights": self.weights, "bias": self.bias}
