"""What the ablations learn from, and what they are asked: kinds of things, in images of the default model's data folder.

Sequences are the interleaved set: few kinds each, so that what stands before helps. Captions are the pairs: one image and
its text. Both are made from their number alone. Queries show images that no run was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from model.tokenizer import PromptTokenizer
from training.default.catalogue import Catalogue, Rows, row_of
from training.default.episodes import Item, as_example
from training.default.templates import Template
from training.default_data.records import Record
from training.default_data.split import held_out, held_out_image
from training.examples import Example, Limits, tokenize
from training.mixture import Prepared

NUM_KINDS = 8
SHOTS = 4
LIMITS = Limits(max_tokens=256, max_media=SHOTS + 1)
TEMPLATE = Template("Output:")


class Kinds:
    """The kinds with most images, by name: rows to train on, and rows that are kept for queries."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        largest = sorted(catalogue.categories, key=lambda name: (-len(catalogue.categories[name]), name))[:NUM_KINDS]
        unseen = catalogue.rows(_is_unseen, lambda record: record.category, 1)
        self.names = tuple(sorted(name for name in largest if name in unseen))
        self.trained: Rows = {name: catalogue.categories[name] for name in self.names}
        self.unseen: Rows = {name: unseen[name] for name in self.names}

    def prepared(self, example: Example, tokenizer: PromptTokenizer, rng: Random) -> Prepared:
        tokens = tokenize(example, tokenizer, LIMITS, rng)
        return Prepared(tokens, {media: self.catalogue.features(row_of(media)) for media in tokens.media})


def _is_unseen(record: Record) -> bool:
    named = not held_out(record.category) and not (record.label and held_out(record.label))
    return record.trains and named and held_out_image(record.image)


class Sequences:
    """The n-th sequence: `SHOTS` + 1 images of two or three kinds, each with the name of its kind."""

    def __init__(self, kinds: Kinds, tokenizer: PromptTokenizer, seed: int) -> None:
        self._kinds, self._tokenizer, self._seed = kinds, tokenizer, seed

    def __call__(self, number: int) -> Prepared:
        rng = Random(f"{self._seed}/sequence/{number}")
        names = rng.sample(self._kinds.names, rng.randint(2, 3))
        drawn = [rng.choice(names) for _ in range(SHOTS + 1)]
        items = [Item(rng.choice(self._kinds.trained[name]), name, True, TEMPLATE) for name in drawn]
        return self._kinds.prepared(as_example(f"sequence/{number}", items), self._tokenizer, rng)


class Captions:
    """The n-th pair: one image with its kind, every other time with its own name too."""

    def __init__(self, kinds: Kinds, tokenizer: PromptTokenizer, seed: int) -> None:
        self._kinds, self._tokenizer, self._seed = kinds, tokenizer, seed

    def __call__(self, number: int) -> Prepared:
        rng = Random(f"{self._seed}/caption/{number}")
        name = rng.choice(self._kinds.names)
        row = rng.choice(self._kinds.trained[name])
        label = self._kinds.catalogue.records[row].label
        text = f"{name}, {label}" if label and rng.random() < 0.5 else name
        example = as_example(f"caption/{number}", [Item(row, text, True, TEMPLATE)])
        return self._kinds.prepared(example, self._tokenizer, rng)


@dataclass(frozen=True, slots=True)
class Query:
    """Shots (row, kind), and an unseen image with its kind."""

    shots: tuple[tuple[int, str], ...]
    row: int
    kind: str


def queries(kinds: Kinds, count: int, seed: int) -> list[Query]:
    """Shots of different kinds at random, the asked one among them or not; every kind is asked equally often."""
    out = []
    for number in range(count):
        rng = Random(f"{seed}/query/{number}")
        kind = kinds.names[number % len(kinds.names)]
        shots = tuple((rng.choice(kinds.trained[name]), name) for name in rng.sample(kinds.names, SHOTS))
        out.append(Query(shots, rng.choice(kinds.unseen[kind]), kind))
    return out


def asked(query: Query, candidate: str) -> Example:
    """The prompt, and a candidate's tokens to be scored."""
    shots = [Item(row, name, False, TEMPLATE) for row, name in query.shots]
    return as_example(f"query/{query.row}", [*shots, Item(query.row, candidate, True, TEMPLATE)])
