"""Measures binding: whether the model learns novel words from its prompt, for images of categories that it has never seen.

An episode's shots come in rounds, with every word once per round; queries branch off after some of the rounds. The controls
are the same words with shuffled images, the same prompt without images, the categories' real names instead of the novel
words (the contribution of language), and the nearest mean of the encoder's pooled features. The other methods of
`/v1/classify` answer after the same shots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.ranking import Branch, Ranker, encode_segments
from model.config import AlonePositions
from model.flamingo import Flamingo
from model.likeness import Likeness, Vectors, unit
from model.prior import NEAREST_MEAN as DEFAULT_PRIOR
from model.prior import Prior
from model.prompt import PromptTokenizer, ShotsAttend
from server.fewshot.classification import combine
from server.fewshot.comparison import ComparedExamples
from server.fewshot.methods import BLEND, BLEND_PARTS, IN_CONTEXT
from server.fewshot.methods import METHODS as BY_LIKENESS
from server.fewshot.methods.likeness import Array, Labelled, log_softmax
from training.default.catalogue import Catalogue, Rows
from training.default.templates import Template, item
from training.default.words import HELD_OUT_WORDS

TEMPLATE = Template("Output:")
REAL_NAMES = "real names"
NEAREST_MEAN = "nearest mean of features"
AUTO = "auto"
# the query shows the mean of the shots' images, and the answer which words the model prefers after these shots
MEAN_IMAGE = "mean image"
VARIANTS = (IN_CONTEXT, "shuffled", "blind", REAL_NAMES)


@dataclass(frozen=True, slots=True)
class Episode:
    words: tuple[str, ...]
    names: tuple[str, ...]  # of the words' categories
    shots: tuple[tuple[int, int], ...]  # row of the image, index of its word; round by round, all words per round
    query: int  # row of the image
    answer: int  # index of the query's word


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers of an episode: for each variant and method, by the number of rounds, whether it was correct."""

    is_correct: dict[str, dict[int, bool]]


def sample_episodes(categories: Rows, ways: int, rounds: int, count: int, seed: int) -> list[Episode]:
    """Sample episodes in which every word index is the answer equally often.

    Raises ValueError if fewer than `ways` categories have enough images.
    """
    usable = sorted(name for name, rows in categories.items() if len(rows) > rounds)
    if len(usable) < ways:
        raise ValueError(f"{len(usable)} categories have more than {rounds} images, {ways} are needed")
    episodes = []
    for number in range(count):
        rng = Random(f"{seed}/{ways}/{rounds}/{number}")
        names, answer = rng.sample(usable, ways), number % ways
        images = [rng.sample(categories[name], rounds + 1) for name in names]
        shots = []
        for number_of_round in range(rounds):
            order = rng.sample(range(ways), ways)
            shots += [(images[word][number_of_round], word) for word in order]
        words = tuple(rng.sample(HELD_OUT_WORDS, ways))
        episodes.append(Episode(words, tuple(names), tuple(shots), images[answer][rounds], answer))
    return episodes


class Binding:
    def __init__(
        self,
        model: Flamingo,
        tokenizer: PromptTokenizer,
        catalogue: Catalogue,
        likeness: Likeness = unit,
        prior: Prior = DEFAULT_PRIOR,
    ) -> None:
        self.model, self.tokenizer, self.catalogue = model, tokenizer, catalogue
        self._likeness, self._prior, self._vectors = likeness, prior, dict[int, Vectors]()
        self._dtype = next(model.resampler.parameters()).dtype

    @torch.inference_mode()
    def judge(self, episode: Episode, rounds: Sequence[int], variants: Sequence[str] = VARIANTS) -> Outcome:
        """Answer the episode after each number of rounds, in each variant and by each method."""
        logs = {number: self._compare(episode, number) for number in rounds}
        answers = {number: {name: int(values.argmax()) for name, values in of.items()} for number, of in logs.items()}
        for number in rounds:
            answers[number][NEAREST_MEAN] = nearest_mean(episode, number, self._normalised_feature)
        num_shots = {number * len(episode.words): number for number in rounds}
        for variant, by_shots in self._rank_variants(episode, [*num_shots], variants).items():
            for count, values in by_shots.items():
                number = num_shots[count]
                answers[number][variant] = int(values.argmax())
                if variant == IN_CONTEXT:
                    likeness = [logs[number][part] for part in BLEND_PARTS if part != IN_CONTEXT]
                    answers[number][BLEND] = int(combine([values, *likeness]).argmax())
        names = answers[rounds[0]]
        return Outcome({name: {number: answers[number][name] == episode.answer for number in rounds} for name in names})

    @torch.inference_mode()
    def answer_in_context(
        self,
        episode: Episode,
        num_shots: Sequence[int],
        shots_attend: ShotsAttend = "previous",
        alone_positions: AlonePositions | None = None,
    ) -> dict[int, int]:
        """Return the language model's answer after each number of shots, as the index of a word."""
        answers = self._rank_variants(episode, num_shots, (IN_CONTEXT,), shots_attend, alone_positions)[IN_CONTEXT]
        return {number: int(values.argmax()) for number, values in answers.items()}

    @torch.inference_mode()
    def log_probabilities(self, episode: Episode, num_rounds: int, variants: Sequence[str]) -> dict[str, Array]:
        """Return the language model's log-probabilities of the words after so many rounds, in each variant."""
        num_shots = num_rounds * len(episode.words)
        shorter = replace(episode, shots=episode.shots[:num_shots])
        by_variant = self._rank_variants(shorter, (num_shots,), variants)
        return {name: by_shots[num_shots] for name, by_shots in by_variant.items()}

    def _compare(self, episode: Episode, num_rounds: int) -> dict[str, Array]:
        """Return the log-probabilities of the words by each method by likeness and by `auto`, as the server does it."""
        shots = episode.shots[: num_rounds * len(episode.words)]
        vectors = np.stack([self._vector(row) for row in (*(row for row, _ in shots), episode.query)])
        labels = np.array([*(word for _, word in shots), episode.answer])
        images = Labelled(vectors, labels, len(episode.words)).compact()
        is_query = np.arange(len(labels)) == len(shots)
        examples = ComparedExamples(images.without(is_query), self._prior)
        logs = {name: examples.fit(name).log_probabilities(images.vectors[is_query])[0] for name in BY_LIKENESS}
        return {**logs, AUTO: logs[examples.choose_method()]}

    def _normalised_feature(self, row: int) -> Tensor:
        return F.normalize(self.catalogue.pooled(row), dim=0)

    def _vector(self, row: int) -> Vectors:
        if row not in self._vectors:
            self._vectors[row] = self._likeness(self.catalogue.pooled(row)[None].numpy())[0]
        return self._vectors[row]

    def _rank_variants(
        self,
        episode: Episode,
        num_shots: Sequence[int],
        variants: Sequence[str],
        shots_attend: ShotsAttend = "previous",
        alone_positions: AlonePositions | None = None,
    ) -> dict[str, dict[int, Array]]:
        if not variants:
            return {}
        rows = list(dict.fromkeys([*(row for row, _ in episode.shots), episode.query]))
        features = [self.catalogue.features(row) for row in rows]
        pages = {row: page for page, row in enumerate(rows)}
        if MEAN_IMAGE in variants:
            shots = [features[pages[row]].float() for row, _ in episode.shots]
            features.append(torch.stack(shots).mean(0).to(features[0].dtype))
        completed = self.model.vision.with_kin(torch.stack(features).to(self._dtype))
        media = self.model.fresh_media(self.model.resampler(completed))
        ranker = Ranker(self.model, media, shots_attend, alone_positions)
        return {name: self._rank(ranker, _variant(episode, name), num_shots, pages, name) for name in variants}

    def _rank(
        self, ranker: Ranker, episode: Episode, num_shots: Sequence[int], pages: dict[int, int], variant: str
    ) -> dict[int, Array]:
        """Return the log-probabilities of the words after each number of shots."""
        pages = {} if variant == "blind" else pages
        shots = [
            encode_segments(item(row, TEMPLATE, episode.words[word]), self.tokenizer, pages.get(row, -1))
            for row, word in episode.shots
        ]
        page = len(pages) if variant == MEAN_IMAGE else pages.get(episode.query, -1)
        branches = []
        for number in num_shots:
            for word in episode.words:
                *query, answer, end_of_answer = item(episode.query, TEMPLATE, word)
                candidate = encode_segments([answer, end_of_answer], self.tokenizer, page)
                branches.append(Branch(number, encode_segments(query, self.tokenizer, page), candidate))
        scores = np.reshape(ranker.scores(shots, branches), (len(num_shots), len(episode.words)))
        return dict(zip(num_shots, log_softmax(scores), strict=True))


def nearest_mean(episode: Episode, num_rounds: int, feature: Callable[[int], Tensor]) -> int:
    """Return the index of the word for which the mean feature of its shots is nearest to the query's feature.

    `feature` returns the normalised feature [Dv] of a row.
    """
    shots = episode.shots[: num_rounds * len(episode.words)]
    means = [
        torch.stack([feature(row) for row, word in shots if word == index]).mean(0)
        for index in range(len(episode.words))
    ]
    return int((torch.stack(means) - feature(episode.query)).square().sum(-1).argmin())


def _variant(episode: Episode, name: str) -> Episode:
    """Return the episode of a variant; "shuffled" assigns the images of each round to other words."""
    if name == REAL_NAMES:
        return replace(episode, words=episode.names)
    if name != "shuffled":
        return episode
    ways = len(episode.words)
    rng = Random(f"{episode.query}/{episode.words}")
    rows = [row for row, _ in episode.shots]
    shots: list[tuple[int, int]] = []
    for first in range(0, len(rows), ways):
        shuffled = rng.sample(rows[first : first + ways], ways)
        shots += [(row, word) for row, (_, word) in zip(shuffled, episode.shots[first : first + ways], strict=True)]
    return replace(episode, shots=tuple(shots))
