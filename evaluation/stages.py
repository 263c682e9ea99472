"""Shows where the default model loses the similarity of images: `python -m evaluation.stages`.

The episodes are those of `evaluation.default`: 5-way, with novel words. The first columns have the accuracy of the nearest
mean of the images' vectors on the way through the model: the discriminants that the bridge reads, the mean of the visual
tokens, and the decoder's state after its first layers. Then come the votes of the heads that look up names, by their mean
score for the names of the shots, and the answer. The last column has the answer with half of the preference for some words
removed: half of the words' log-probabilities after the mean of the shots' images. Progress goes to standard error; the last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.binding import MEAN_IMAGE, TEMPLATE, Binding, Episode, nearest_mean, sample_episodes
from evaluation.counts import at_least
from evaluation.default import SEED
from evaluation.intervals import share
from evaluation.loading import load_served
from evaluation.options import add_data_option
from evaluation.pool import process_pool
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer
from model.zoo.default import prepare
from server.fewshot.methods import IN_CONTEXT
from training.batch import TrainingBatch, collate
from training.bridge import BridgeLoss
from training.default.catalogue import Catalogue, row_of
from training.default.discriminants import Discriminants, fit_discriminants
from training.default.episodes import LIMITS, Item, build_example
from training.default.matching import find_name_heads, forward_with_scores, probe_sequences
from training.default.states import media_states, single_image_prompt
from training.examples import tokenize

WAYS, ROUNDS = 5, (1, 5)
VECTORS = ("discriminants", "visual tokens", "early states")
VOTES, ANSWER, CALIBRATED = "votes of the heads", "answer", "answer, preference halved"
COLUMNS = (*VECTORS, VOTES, ANSWER, CALIBRATED)
EPISODE_LIMITS = replace(LIMITS, max_tokens=1024, max_media=WAYS * max(ROUNDS) + 1)


class Stages:
    """Judges episodes at each stage of a model whose bridge reads discriminants."""

    def __init__(
        self, model: Flamingo, tokenizer: PromptTokenizer, catalogue: Catalogue, discriminants: Discriminants
    ) -> None:
        self.model, self._tokenizer, self._catalogue, self._discriminants = model, tokenizer, catalogue, discriminants
        self._binding, self._bridge = Binding(model, tokenizer, catalogue), BridgeLoss(model)
        self._heads = find_name_heads(model.language_model, probe_sequences(tokenizer))
        self._prompt = single_image_prompt(tokenizer)
        self._vectors: dict[int, dict[str, Tensor]] = {}

    @torch.inference_mode()
    def judge(self, episode: Episode, num_rounds: int) -> dict[str, bool]:
        """Return whether the episode is answered correctly at each stage, after so many rounds of shots."""
        answers = {
            name: nearest_mean(episode, num_rounds, self._directions(episode, num_rounds, name)) for name in VECTORS
        }
        answers[VOTES] = self._votes(episode, num_rounds)
        logs = self._binding.log_probabilities(episode, num_rounds, (IN_CONTEXT, MEAN_IMAGE))
        answers[ANSWER] = int(logs[IN_CONTEXT].argmax())
        answers[CALIBRATED] = int((logs[IN_CONTEXT] - logs[MEAN_IMAGE] / 2).argmax())
        return {name: answer == episode.answer for name, answer in answers.items()}

    def _directions(self, episode: Episode, num_rounds: int, name: str) -> Callable[[int], Tensor]:
        """Return a function from an image's row to the direction of its vector from the mean of the shots."""
        shots = episode.shots[: num_rounds * len(episode.words)]
        mean = torch.stack([self._vectors_of(row)[name] for row, _ in shots]).mean(0)
        return lambda row: F.normalize(self._vectors_of(row)[name] - mean, dim=0)

    def _vectors_of(self, row: int) -> dict[str, Tensor]:
        if row not in self._vectors:
            (features,) = self._bridge.features((self._catalogue.features(row),))
            tokens = self._bridge.visual_tokens((features,))
            states = media_states(self.model, self.model.fresh_media(tokens), self._prompt)
            vectors = (self._discriminants(features.float().mean((0, 1))), tokens[0].float().mean(0), states[0].float())
            self._vectors[row] = dict(zip(VECTORS, vectors, strict=True))
        return self._vectors[row]

    def _votes(self, episode: Episode, num_rounds: int) -> int:
        """Return the word with the most votes: the weights of a softmax over the names' mean scores."""
        batch = self._batch(episode, num_rounds)
        media = self.model.fresh_media(self._bridge.visual_tokens(batch.media))
        _, scores = forward_with_scores(self.model, batch, media, self._heads)
        weights = scores.mean(0)[-1, :-1].softmax(0)
        words = torch.tensor([word for _, word in episode.shots[: len(weights)]])
        return int(torch.zeros(len(episode.words)).index_add(0, words, weights).argmax())

    def _batch(self, episode: Episode, num_rounds: int) -> TrainingBatch:
        """Return the shots and the query as one sequence, which ends with the query's own name; no vote reads it."""
        images = [*episode.shots[: num_rounds * len(episode.words)], (episode.query, episode.answer)]
        items = [Item(row, episode.words[word], True, TEMPLATE) for row, word in images]
        tokens = tokenize(build_example("episode", items), self._tokenizer, EPISODE_LIMITS, Random(0))
        media = {digest: self._catalogue.features(row_of(digest)) for digest in tokens.media}
        return collate([tokens], media, self.model.language_model.embed.weight.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    episodes: int
    model: Path
    data: Path
    processes: int
    dtype: str


# the evaluator of a worker process, set once by its initialiser
_process_stages: list[Stages] = []


def _initialise(options: Options) -> None:
    model, tokenizer = load_served(options.model, options.dtype)
    discriminants = fit_discriminants(options.data, model.config.resampler.dim, model.vision.kin)
    _process_stages.append(Stages(model, tokenizer, Catalogue(options.data), discriminants))


def _judge(episode: Episode, num_rounds: int) -> dict[str, bool]:
    return _process_stages[0].judge(episode, num_rounds)


def format_rows(rows: Mapping[str, Mapping[str, list[bool]]]) -> str:
    lines = [f"| images, shots per word | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    lines += [f"| {name} | {' | '.join(str(share(row[column])) for column in COLUMNS)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.stages", description=__doc__)
    parser.add_argument("--episodes", type=at_least(1), default=500, help="episodes per row (default: 500)")
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    add_data_option(parser)
    parser.add_argument("--processes", type=at_least(1), default=2, help="worker processes, each with one thread")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the weights' dtype")
    values = vars(parser.parse_args(arguments))
    options = Options(**{**values, "model": values["model"] or prepare()})
    catalogue = Catalogue(options.data)
    rows: dict[str, dict[str, list[bool]]] = {}
    with process_pool(options.processes, _initialise, options) as pool:
        for name, categories in (("drawings", catalogue.held_out_labels), ("photographs", catalogue.photographs)):
            episodes = sample_episodes(categories, WAYS, max(ROUNDS), options.episodes, SEED)
            for num_rounds in ROUNDS:
                started = time.monotonic()
                judged = list(pool.map(partial(_judge, num_rounds=num_rounds), episodes, chunksize=5))
                rows[f"{name}, {num_rounds}"] = {column: [of[column] for of in judged] for column in COLUMNS}
                print(f"{name}, {num_rounds}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(format_rows(rows))
    shares = {name: {column: share(row[column]).value for column in COLUMNS} for name, row in rows.items()}
    print(json.dumps({"episodes": options.episodes, "model": str(options.model), "shares": shares}))


if __name__ == "__main__":
    main()
