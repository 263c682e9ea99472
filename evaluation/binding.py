"""Novel words taught by a prompt: does the model say the right one for an image of a category that it never saw?

An episode's shots come in rounds, every word once a round; queries branch off behind some of the rounds. Beside it: the
same words over shuffled images, the same prompt with no image, the categories' real names in place of the novel words
(what language adds), and the nearest mean of the encoder's pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
import torch.nn.functional as F

from evaluation.ranking import Branch, Piece, Ranker
from model.flamingo import Flamingo
from model.prompt import Segment
from model.tokenizer import PromptTokenizer
from training.default.catalogue import Catalogue, Rows
from training.default.templates import Template, item
from training.default.words import HELD_OUT_WORDS
from training.examples import encode_segment

TEMPLATE = Template("Output:")
REAL_NAMES = "real names"
VARIANTS = ("model", "shuffled", "blind", REAL_NAMES)


@dataclass(frozen=True, slots=True)
class Episode:
    words: tuple[str, ...]
    names: tuple[str, ...]  # of the words' categories
    shots: tuple[tuple[int, int], ...]  # row of the image, number of its word; rounds of all words
    query: int
    answer: int  # number of the query's word


@dataclass(frozen=True, slots=True)
class Outcome:
    """By the number of rounds: whether the answer was right, for each variant and for the nearest mean."""

    right: dict[str, dict[int, bool]]


def make_episodes(categories: Rows, ways: int, rounds: int, count: int, seed: int) -> list[Episode]:
    """Balanced: each place among the words is the answer equally often. Fewer categories than ways is an error."""
    usable = sorted(name for name, rows in categories.items() if len(rows) > rounds)
    if len(usable) < ways:
        raise ValueError(f"{len(usable)} categories have more than {rounds} images, {ways} are needed")
    episodes = []
    for number in range(count):
        rng = Random(f"{seed}/{ways}/{rounds}/{number}")
        names, answer = rng.sample(usable, ways), number % ways
        images = [rng.sample(categories[name], rounds + 1) for name in names]
        shots = []
        for turn in range(rounds):
            order = rng.sample(range(ways), ways)
            shots += [(images[word][turn], word) for word in order]
        words = tuple(rng.sample(HELD_OUT_WORDS, ways))
        episodes.append(Episode(words, tuple(names), tuple(shots), images[answer][rounds], answer))
    return episodes


class Binding:
    def __init__(self, model: Flamingo, tokenizer: PromptTokenizer, catalogue: Catalogue) -> None:
        self.model, self.tokenizer, self.catalogue = model, tokenizer, catalogue
        self._dtype = next(model.resampler.parameters()).dtype

    @torch.inference_mode()
    def judge(self, episode: Episode, rounds: Sequence[int], variants: Sequence[str] = VARIANTS) -> Outcome:
        right = {"nearest mean": {turn: self._nearest(episode, turn) == episode.answer for turn in rounds}}
        if not variants:
            return Outcome(right)
        rows = list(dict.fromkeys([*(row for row, _ in episode.shots), episode.query]))
        features = torch.stack([self.catalogue.features(row) for row in rows]).to(self._dtype)
        ranker = Ranker(self.model, self.model.fresh_media(self.model.resampler(features)))
        pages = {row: page for page, row in enumerate(rows)}
        right |= {name: self._ranked(ranker, _variant(episode, name), rounds, pages, name) for name in variants}
        return Outcome(right)

    def _ranked(
        self, ranker: Ranker, episode: Episode, rounds: Sequence[int], pages: dict[int, int], variant: str
    ) -> dict[int, bool]:
        reads = {} if variant == "blind" else pages
        shots = [
            self._piece(item(row, TEMPLATE, episode.words[word]), reads.get(row, -1)) for row, word in episode.shots
        ]
        ends = [sum(len(shot.token_ids) for shot in shots[: turn * len(episode.words)]) for turn in rounds]
        page = reads.get(episode.query, -1)
        branches = []
        for end in ends:
            for word in episode.words:
                *query, answer, close = item(episode.query, TEMPLATE, word)
                branches.append(Branch(end, self._piece(query, page), self._piece([answer, close], page)))
        scores = ranker.scores(joined(shots), branches)
        ways = len(episode.words)
        best = [
            max(range(ways), key=scores[place * ways : (place + 1) * ways].__getitem__) for place in range(len(rounds))
        ]
        return {turn: word == episode.answer for turn, word in zip(rounds, best, strict=True)}

    def _piece(self, segments: Sequence[Segment], page: int) -> Piece:
        ids = [token for segment in segments for token in encode_segment(segment, self.tokenizer)]
        return Piece(ids, [page] * len(ids))

    def _nearest(self, episode: Episode, turn: int) -> int:
        shown = episode.shots[: turn * len(episode.words)]
        means = [
            torch.stack([F.normalize(self.catalogue.pooled(row), dim=0) for row, word in shown if word == wanted]).mean(
                0
            )
            for wanted in range(len(episode.words))
        ]
        query = F.normalize(self.catalogue.pooled(episode.query), dim=0)
        return int((torch.stack(means) - query).square().sum(-1).argmin())


def joined(pieces: Sequence[Piece]) -> Piece:
    return Piece([t for p in pieces for t in p.token_ids], [page for p in pieces for page in p.pages])


def _variant(episode: Episode, name: str) -> Episode:
    """Shuffled: the images of each round are dealt anew to its words."""
    if name == REAL_NAMES:
        return replace(episode, words=episode.names)
    if name != "shuffled":
        return episode
    ways = len(episode.words)
    rng = Random(f"{episode.query}/{episode.words}")
    rows = [row for row, _ in episode.shots]
    shots: list[tuple[int, int]] = []
    for first in range(0, len(rows), ways):
        dealt = rng.sample(rows[first : first + ways], ways)
        shots += [(row, word) for row, (_, word) in zip(dealt, episode.shots[first : first + ways], strict=True)]
    return replace(episode, shots=tuple(shots))
