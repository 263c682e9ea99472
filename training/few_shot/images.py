"""Episodes of the default model's images: training uses the training labels, the questions use held-out labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from model.prompt import PromptTokenizer
from training.default.catalogue import Catalogue, Rows, row_digest
from training.few_shot.episode import MAX_MEDIA, Question, ask, mark_taught, prepare
from training.few_shot.language import WORDS
from training.mixture import PreparedExample

SHOTS = (0, 1, 2, 4, 8, 16, 32)
WAYS = 4
# maximum of labels in a training episode; with more, few words would be taught before they are asked
MAX_TRAINING_WAYS = 3
QUERY_SEED = 23


class TaughtImages:
    """The n-th episode has `MAX_MEDIA` images of two or three labels, each with a word that only the episode gives it."""

    def __init__(self, catalogue: Catalogue, tokenizer: PromptTokenizer, seed: int) -> None:
        self._catalogue, self._tokenizer, self._seed = catalogue, tokenizer, seed
        self._names = sorted(name for name, rows in catalogue.labels.items() if len(rows) >= MAX_MEDIA)

    def __call__(self, number: int) -> PreparedExample:
        rng = Random(f"{self._seed}/images/{number}")
        labels = rng.sample(self._names, rng.randint(2, MAX_TRAINING_WAYS))
        words = dict(zip(labels, rng.sample(WORDS, len(labels)), strict=True))
        drawn = {label: iter(rng.sample(self._catalogue.labels[label], MAX_MEDIA)) for label in labels}
        rows = [(next(drawn[label]), words[label]) for label in rng.choices(labels, k=MAX_MEDIA)]
        media = {row_digest(row): self._catalogue.features(row) for row, _ in rows}
        pairs = [(row_digest(row), word) for row, word in rows]
        return prepare(f"images/{number}", mark_taught(pairs), media, self._tokenizer)


def held_out_labels(catalogue: Catalogue) -> Rows:
    """Return the held-out labels with enough images for the longest prompt, none of which is shown twice."""
    per_label = max(SHOTS) // WAYS + 1
    return {label: rows for label, rows in catalogue.held_out_labels.items() if len(rows) >= per_label}


def draw_questions(
    catalogue: Catalogue, tokenizer: PromptTokenizer, count: int, seed: int, num_shots: int
) -> Iterator[Question]:
    """Yield questions that have the same queries for any number of shots; longer prompts begin with the shorter ones.

    Each group of `WAYS` shots shows every label once, in random order, so four or more shots show the query's label.
    """
    labels = held_out_labels(catalogue)
    for number in range(count):
        rng = Random(f"{QUERY_SEED}/{seed}/{number}")
        names, words = rng.sample(sorted(labels), WAYS), rng.sample(WORDS, WAYS)
        rows = [rng.sample(labels[name], max(SHOTS) // WAYS + 1) for name in names]
        correct = rng.randrange(WAYS)
        query = (rows[correct].pop(), words[correct])
        rounds = [rng.sample(range(WAYS), WAYS) for _ in range(max(SHOTS) // WAYS)]
        shots = [(rows[way][turn], words[way]) for turn, ways in enumerate(rounds) for way in ways]
        yield _question(catalogue, tokenizer, number, shots[:num_shots], query, words)


def _question(
    catalogue: Catalogue,
    tokenizer: PromptTokenizer,
    number: int,
    shots: Sequence[tuple[int, str]],
    query: tuple[int, str],
    words: Sequence[str],
) -> Question:
    media = {row_digest(row): catalogue.features(row) for row, _ in [*shots, query]}
    pairs = [(row_digest(row), word) for row, word in shots]
    return ask(f"query/{number}", pairs, (row_digest(query[0]), query[1]), words, media, tokenizer)
