"""The training data and the queries of the ablations: categories ("kinds") of the images in the default model's data.

Sequences are the interleaved set; each has few kinds, so that earlier shots help. Captions are the set of pairs of an image
and a text. Both are generated from their number alone. Queries show images on which no run was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from model.prompt import PromptTokenizer
from training.default.catalogue import Catalogue, Rows, row_of
from training.default.episodes import Item, build_example
from training.default.templates import Template
from training.default_data.records import Record
from training.default_data.split import has_held_out_name, is_held_out_image
from training.examples import Example, Limits, tokenize
from training.mixture import PreparedExample

NUM_KINDS = 8
SHOTS = 4
LIMITS = Limits(max_tokens=256, max_media=SHOTS + 1)
TEMPLATE = Template("Output:")


class Kinds:
    """The kinds with the most images, by name, with rows for training and rows for queries."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        largest = sorted(catalogue.categories, key=lambda name: (-len(catalogue.categories[name]), name))[:NUM_KINDS]
        query_rows = catalogue.rows(_is_query_record, lambda record: record.category, 1)
        self.names = tuple(sorted(name for name in largest if name in query_rows))
        self.training_rows: Rows = {name: catalogue.categories[name] for name in self.names}
        self.query_rows: Rows = {name: query_rows[name] for name in self.names}

    def prepare(self, example: Example, tokenizer: PromptTokenizer, rng: Random) -> PreparedExample:
        tokens = tokenize(example, tokenizer, LIMITS, rng)
        return PreparedExample(tokens, {media: self.catalogue.features(row_of(media)) for media in tokens.media})


def _is_query_record(record: Record) -> bool:
    return record.trains and not has_held_out_name(record) and is_held_out_image(record.image)


class Sequences:
    """The n-th sequence has `SHOTS` + 1 images of two or three kinds, each with the name of its kind."""

    def __init__(self, kinds: Kinds, tokenizer: PromptTokenizer, seed: int) -> None:
        self._kinds, self._tokenizer, self._seed = kinds, tokenizer, seed

    def __call__(self, number: int) -> PreparedExample:
        rng = Random(f"{self._seed}/sequence/{number}")
        names = rng.sample(self._kinds.names, rng.randint(2, 3))
        shot_names = [rng.choice(names) for _ in range(SHOTS + 1)]
        items = [Item(rng.choice(self._kinds.training_rows[name]), name, True, TEMPLATE) for name in shot_names]
        return self._kinds.prepare(build_example(f"sequence/{number}", items), self._tokenizer, rng)


class Captions:
    """The n-th pair is one image with the name of its kind and, half of the time, its own label."""

    def __init__(self, kinds: Kinds, tokenizer: PromptTokenizer, seed: int) -> None:
        self._kinds, self._tokenizer, self._seed = kinds, tokenizer, seed

    def __call__(self, number: int) -> PreparedExample:
        rng = Random(f"{self._seed}/caption/{number}")
        name = rng.choice(self._kinds.names)
        row = rng.choice(self._kinds.training_rows[name])
        label = self._kinds.catalogue.records[row].label
        text = f"{name}, {label}" if label and rng.random() < 0.5 else name
        example = build_example(f"caption/{number}", [Item(row, text, True, TEMPLATE)])
        return self._kinds.prepare(example, self._tokenizer, rng)


@dataclass(frozen=True, slots=True)
class Query:
    """Shots (row, kind), and a held-out image with its kind."""

    shots: tuple[tuple[int, str], ...]
    row: int
    kind: str


def draw_queries(kinds: Kinds, count: int, seed: int) -> list[Query]:
    """Draw queries whose shots show different kinds, with or without the query's kind; kinds are queried equally often."""
    queries = []
    for number in range(count):
        rng = Random(f"{seed}/query/{number}")
        kind = kinds.names[number % len(kinds.names)]
        shots = tuple((rng.choice(kinds.training_rows[name]), name) for name in rng.sample(kinds.names, SHOTS))
        queries.append(Query(shots, rng.choice(kinds.query_rows[kind]), kind))
    return queries


def query_example(query: Query, candidate: str) -> Example:
    """Return the query's prompt with a candidate as its answer, whose tokens are the targets."""
    shots = [Item(row, name, False, TEMPLATE) for row, name in query.shots]
    return build_example(f"query/{query.row}", [*shots, Item(query.row, candidate, True, TEMPLATE)])
