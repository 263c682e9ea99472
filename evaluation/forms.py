"""Compares the forms of a few-shot prompt: shots attend to earlier shots, or alone: `python -m evaluation.forms`.

The default model names images of held-out categories by novel words, 5-way, after 1 and 5 shots per word. A query sees
shots that attend alone at the same positions, or in a row (`alone_positions` of a model). All forms answer the same
episodes. The first episodes are also answered with their shots in several random orders, unless all orders are equal.
Progress goes to standard error, tables to standard output; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeAlias

from evaluation.binding import Binding, Episode, sample_episodes
from evaluation.counts import at_least
from evaluation.default import SEED
from evaluation.intervals import difference_to_best, share
from evaluation.loading import load_served
from evaluation.options import add_data_option
from evaluation.pool import process_pool
from model.config import AlonePositions
from model.prompt import ShotsAttend
from model.zoo.default import prepare
from training.default.catalogue import Catalogue

WAYS, ROUNDS = 5, (1, 5)
PREVIOUS = "previous"
Correct: TypeAlias = dict[int, bool]  # by number of rounds


COLUMNS = ("images", "shots per word", "shots attend", "accuracy", "less previous", "by order", "changed by order")


class Form(NamedTuple):
    """A form of a prompt, and the positions at which a query sees shots that attend alone."""

    shots_attend: ShotsAttend
    alone_positions: AlonePositions = "restart"

    @property
    def has_order(self) -> bool:
        return self.shots_attend == "previous" or self.alone_positions == "in_a_row"


FORMS = {PREVIOUS: Form("previous"), "alone": Form("alone"), "alone, in a row": Form("alone", "in_a_row")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    episodes: int
    orders: int
    order_episodes: int
    model: Path
    data: Path
    processes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Answers:
    """The correctness of the answers to an episode, by form, for its own order of the shots and for random ones."""

    in_own_order: dict[str, Correct]
    by_order: dict[str, list[Correct]]  # of forms that have an order


def in_order(episode: Episode, seed: int) -> Episode:
    """Return an episode whose shots are in a random order within those of its first round, and within the others."""
    rng = Random(f"{episode.query}/{episode.words}/{seed}")
    first, later = episode.shots[:WAYS], episode.shots[WAYS:]
    return replace(episode, shots=(*rng.sample(first, len(first)), *rng.sample(later, len(later))))


# the evaluator of a worker process, set once by its initialiser
_process_binding: list[Binding] = []


def _initialise(options: Options) -> None:
    _process_binding.append(Binding(*load_served(options.model, options.dtype), Catalogue(options.data)))


def _answer(task: tuple[Episode, int]) -> Answers:
    """Answer an episode in all forms, and in the given number of random orders."""
    episode, num_orders = task
    orders = [in_order(episode, seed) for seed in range(num_orders)]
    return Answers(
        {name: _is_correct(episode, form) for name, form in FORMS.items()},
        {name: [_is_correct(order, form) for order in orders] for name, form in FORMS.items() if form.has_order},
    )


def _is_correct(episode: Episode, form: Form) -> Correct:
    answers = _process_binding[0].answer_in_context(episode, [WAYS * number for number in ROUNDS], *form)
    return {number: answers[WAYS * number] == episode.answer for number in ROUNDS}


def answer_all(
    name: str, episodes: Sequence[Episode], options: Options, pool: ProcessPoolExecutor
) -> Iterator[Answers]:
    """Yield the answers to episodes, and report the progress."""
    started = time.monotonic()
    tasks = [(episode, options.orders if i < options.order_episodes else 0) for i, episode in enumerate(episodes)]
    for number, answers in enumerate(pool.map(_answer, tasks, chunksize=2), 1):
        yield answers
        if number % 25 == 0:
            print(f"{name}: {number} of {len(tasks)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def summarise(name: str, answers: Sequence[Answers], num_rounds: int, form: str) -> dict[str, str | float]:
    """Return a row of the table."""
    correct, previous = ([of.in_own_order[each][num_rounds] for of in answers] for each in (form, PREVIOUS))
    by_order = [[order[num_rounds] for order in of.by_order.get(form, [])] for of in answers]
    row: dict[str, str | float] = {"images": name, "shots per word": num_rounds, "shots attend": form}
    row["accuracy"] = str(share(correct))
    if form != PREVIOUS:
        row["less previous"] = difference_to_best({form: correct, PREVIOUS: previous}, form)
    if by_order := [orders for orders in by_order if orders]:
        shares = [statistics.fmean(order) for order in zip(*by_order, strict=True)]
        row["by order"] = f"{min(shares):.3f} .. {max(shares):.3f}"
        row["changed by order"] = statistics.fmean(len(set(orders)) > 1 for orders in by_order)
    return row


def format_rows(rows: Sequence[dict[str, str | float]]) -> str:
    named = {name for row in rows for name in row}
    columns = [name for name in COLUMNS if name in named]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        lines.append(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.forms", description=__doc__)
    parser.add_argument("--episodes", type=at_least(1), default=500, help="episodes per set of images (default: 500)")
    parser.add_argument("--orders", type=at_least(0), default=6, help="random orders of the shots (default: 6)")
    parser.add_argument(
        "--order-episodes", type=at_least(0), default=100, help="episodes in all of these orders (default: 100)"
    )
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    add_data_option(parser)
    parser.add_argument("--processes", type=at_least(1), default=2, help="worker processes, each with one thread")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the weights' dtype")
    values = vars(parser.parse_args(arguments))
    options = Options(**{**values, "model": values["model"] or prepare()})
    catalogue = Catalogue(options.data)
    rows = []
    with process_pool(options.processes, _initialise, options) as pool:
        for name, categories in (("drawings", catalogue.held_out_labels), ("photographs", catalogue.photographs)):
            episodes = sample_episodes(categories, WAYS, max(ROUNDS), options.episodes, SEED)
            answers = list(answer_all(name, episodes, options, pool))
            rows += [summarise(name, answers, num_rounds, form) for num_rounds in ROUNDS for form in FORMS]
    print(format_rows(rows))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    print(json.dumps({"options": settings, "rows": rows}))


if __name__ == "__main__":
    main()
