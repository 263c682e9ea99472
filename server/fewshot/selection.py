"""Selects which examples of a support set become shots, and their order in the prompt.

A strategy picks examples, best first; an order then arranges them. All functions are pure: for one version of a set, a
seed always gives the same shots.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from server.schemas.fewshot import Order, Strategy


class SelectionError(ValueError):
    """A selection that is impossible with these examples; the message is for the user, `field` names the invalid field."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class Labelled(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def label(self) -> str: ...


Item = TypeVar("Item", bound=Labelled)


@dataclass(frozen=True, slots=True)
class Similar:
    """An example by its index in the set, and its similarity to the query, -1 to 1."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Selected(Generic[Item]):
    """A selected example; `score` is None if the strategy does not compare examples with the query."""

    example: Item
    score: float | None = None


# strategies that compare examples with the query
SIMILARITY: frozenset[Strategy] = frozenset({"rices_image", "rices_text", "mixed"})
# the paper puts the most similar example next to the query
DEFAULT_ORDER: dict[Strategy, Order] = {
    "first": "stored",
    "random": "as_selected",
    "balanced": "as_selected",
    "rices_image": "similar_last",
    "rices_text": "similar_last",
    "mixed": "similar_last",
}


def select(
    strategy: Strategy,
    examples: Sequence[Item],
    k: int,
    *,
    seed: int = 0,
    order: Order | None = None,
    similar: Sequence[Similar] = (),
    without: Collection[int] = (),
) -> list[Selected[Item]]:
    """Return `k` examples in prompt order. `similar`: for strategies of `SIMILARITY`, the most similar, best first.

    `without`: indices of examples that may not be selected. The next examples of the draw replace them, so that leaving
    one out does not change the others. Raises `SelectionError`.
    """
    check(strategy, len(examples) - len(without), k, order)
    num_picked = k + len(without)
    scores: dict[int, float] = {}
    if strategy in SIMILARITY:
        scores = {example.index: example.score for example in similar[:num_picked]}
        picked = list(scores)
    else:
        picked = _PICK[strategy](examples, num_picked, random.Random(seed))
    kept = [index for index in picked if index not in without][:k]
    ordered = _ordered(kept, order or DEFAULT_ORDER[strategy], seed)
    return [Selected(examples[index], scores.get(index)) for index in ordered]


def check(strategy: Strategy, num_examples: int, k: int, order: Order | None) -> None:
    """Check a selection before any example is compared. Raises `SelectionError`."""
    if k > num_examples:
        raise SelectionError(f"k is {k}, only {num_examples} examples can be selected", field="k")
    if order == "similar_last" and strategy not in SIMILARITY:
        raise SelectionError(
            f"similar_last needs a strategy that compares examples, {strategy} compares none", field="order"
        )


def _ordered(indices: list[int], order: Order, seed: int) -> list[int]:
    match order:
        case "as_selected":
            return indices
        case "similar_last":
            return indices[::-1]
        case "stored":
            return sorted(indices)
        case "shuffled":
            # independent of the random numbers that picked
            return random.Random(f"order {seed}").sample(indices, len(indices))


def _first(examples: Sequence[Labelled], k: int, rng: random.Random) -> list[int]:
    return list(range(k))


def _random(examples: Sequence[Labelled], k: int, rng: random.Random) -> list[int]:
    """Draw so that a larger `k` begins with the examples of a smaller one."""
    return rng.sample(range(len(examples)), len(examples))[:k]


def _balanced(examples: Sequence[Labelled], k: int, rng: random.Random) -> list[int]:
    """Draw in rounds of one example per label, so that the counts of labels differ by at most one."""
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if not example.label:
            raise SelectionError(f"balanced needs a label for each example, {example.id!r} has none", field="strategy")
        by_label.setdefault(example.label, []).append(index)
    for indices in by_label.values():
        rng.shuffle(indices)
    picked: list[int] = []
    while len(picked) < k:
        labels = [label for label, indices in by_label.items() if indices]
        rng.shuffle(labels)
        picked += [by_label[label].pop() for label in labels[: k - len(picked)]]
    return picked


_PICK: dict[Strategy, Callable[[Sequence[Labelled], int, random.Random], list[int]]] = {
    "first": _first,
    "random": _random,
    "balanced": _balanced,
}
