"""Which examples of a support set become shots, and in which order they stand in the prompt.

A strategy picks from the most to the least wanted; an order then places what was picked. All of it is a function of
its arguments: a seed gives the same shots for as long as the set's version is the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from server.schemas.fewshot import Order, Strategy


class SelectionError(ValueError):
    """A choice that these examples cannot give; the message is for the user. `field` is the one at fault."""

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
    """An example by its place among all, and its similarity to the query, -1 to 1."""

    place: int
    score: float


@dataclass(frozen=True, slots=True)
class Chosen(Generic[Item]):
    """`score` is None where the strategy does not look at the query."""

    example: Item
    score: float | None = None


# strategies that look at the query
SIMILARITY: frozenset[Strategy] = frozenset({"rices_image", "rices_text", "mixed"})
# the paper puts what is most like the query nearest to it
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
) -> list[Chosen[Item]]:
    """`k` examples in prompt order. `similar`: for strategies of `SIMILARITY`, the most similar, best first.

    `without`: places of examples that may not be chosen. What is picked is then what would be picked with them, the next
    ones in their stead: left out of a random draw, an example leaves the draw's others as they are.

    Raises `SelectionError`: more than there are, a label that is missing, an order that has no meaning.
    """
    check(strategy, len(examples) - len(without), k, order)
    num_picked = k + len(without)
    scores: dict[int, float] = {}
    if strategy in SIMILARITY:
        scores = {found.place: found.score for found in similar[:num_picked]}
        picked = list(scores)
    else:
        picked = _PICK[strategy](examples, num_picked, random.Random(seed))
    places = [place for place in picked if place not in without][:k]
    return [
        Chosen(examples[place], scores.get(place)) for place in _placed(places, order or DEFAULT_ORDER[strategy], seed)
    ]


def check(strategy: Strategy, num_examples: int, k: int, order: Order | None) -> None:
    """What can be refused before anything is compared."""
    if k > num_examples:
        raise SelectionError(f"k is {k}, and there are {num_examples} examples to choose from", field="k")
    if order == "similar_last" and strategy not in SIMILARITY:
        raise SelectionError(f"similar_last needs a strategy that compares, and {strategy} does not", field="order")


def _placed(places: list[int], order: Order, seed: int) -> list[int]:
    match order:
        case "as_selected":
            return places
        case "similar_last":
            return places[::-1]
        case "stored":
            return sorted(places)
        case "shuffled":
            # other random numbers than those that picked
            return random.Random(f"order {seed}").sample(places, len(places))


def _first(examples: Sequence[Labelled], k: int, rng: random.Random) -> list[int]:
    return list(range(k))


def _random(examples: Sequence[Labelled], k: int, rng: random.Random) -> list[int]:
    """More shots begin with those of fewer."""
    return rng.sample(range(len(examples)), len(examples))[:k]


def _balanced(examples: Sequence[Labelled], k: int, rng: random.Random) -> list[int]:
    """In rounds that show each label once, in an order of their own: counts differ by one at most while labels last."""
    by_label: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if not example.label:
            raise SelectionError(f"balanced needs labels, and the example {example.id!r} has none", field="strategy")
        by_label.setdefault(example.label, []).append(place)
    for places in by_label.values():
        rng.shuffle(places)
    picked: list[int] = []
    while len(picked) < k:
        labels = [label for label, places in by_label.items() if places]
        rng.shuffle(labels)
        picked += [by_label[label].pop() for label in labels[: k - len(picked)]]
    return picked


_PICK: dict[Strategy, Callable[[Sequence[Labelled], int, random.Random], list[int]]] = {
    "first": _first,
    "random": _random,
    "balanced": _balanced,
}
