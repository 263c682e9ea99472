"""Print the default model's evaluation tables, computed in process from its folder and the cached features.

`python -m evaluation.default` ranks held-out categories by likelihood, next to shuffled and blind prompts, the nearest mean
of the encoder's features and all methods of classification, and measures names, captions, style and perplexity. Progress
goes to standard error, the tables to standard output; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.binding import AUTO, NEAREST_MEAN, VARIANTS, Binding, Episode, Outcome, sample_episodes
from evaluation.counts import at_least
from evaluation.held_out import ROUNDS
from evaluation.intervals import Share, difference_to_best, share
from evaluation.loading import load_served
from evaluation.naming import Naming, perplexity
from evaluation.options import add_data_option
from evaluation.pool import process_pool
from model.folder import load_folder
from model.likeness import load_likeness
from model.prior import load_prior
from model.prompt import PromptTokenizer
from model.quantised import KINDS, WeightFormat
from model.zoo.default import prepare
from server.fewshot.methods import BLEND, IN_CONTEXT, METHODS
from training.default.catalogue import Catalogue, Rows

SEED = 17
# English prose from an old version of docs/architecture.md; a fixed file keeps the perplexity comparable
TEXT = Path(__file__).with_name("perplexity_text.txt")
KIND_ROUNDS = {5: (1, 2)}
DOMAINS = ("drawings", "photographs", "kinds of drawings")
NAMING_WAYS = 10

# whether answers are correct, by row and column of a table
AnswersByRow = dict[str, dict[str, list[bool]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    episodes: int
    controls: int | None
    model: Path | None
    data: Path
    processes: int
    dtype: str
    weight_format: WeightFormat | None = None
    encoder_only: bool = False
    domains: Sequence[str] = DOMAINS
    seed: int = SEED

    @property
    def variants(self) -> tuple[str, ...]:
        if self.encoder_only:
            return ()
        return VARIANTS[:1] if self.controls == 0 else VARIANTS

    def variants_of(self, number: int) -> tuple[str, ...]:
        """Return the variants in which the episode with this number is judged."""
        return self.variants if self.controls is None or number < self.controls else self.variants[:1]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.variants, NEAREST_MEAN, *METHODS, *(() if self.encoder_only else (BLEND,)), AUTO)


def binding_table(catalogue: Catalogue, options: Options, folder: Path) -> AnswersByRow:
    """Return whether answers are correct by row, such as "drawings, 5-way, 1 per word (5 in all)", and column."""
    rows: AnswersByRow = {}
    domains: tuple[tuple[Rows, Mapping[int, tuple[int, ...]]], ...] = (
        (catalogue.held_out_labels, ROUNDS),
        (catalogue.photographs, ROUNDS),
        (catalogue.held_out_kinds, KIND_ROUNDS),
    )
    with process_pool(options.processes, _initialise, folder, options) as pool:
        for domain, (categories, rounds_by_ways) in zip(DOMAINS, domains, strict=True):
            for ways, rounds in rounds_by_ways.items() if domain in options.domains else ():
                episodes = sample_episodes(categories, ways, max(rounds), options.episodes, options.seed)
                tasks = [(episode, rounds, options.variants_of(number)) for number, episode in enumerate(episodes)]
                results = pool.map(_judge, tasks, chunksize=5)
                outcomes = list(_report_progress(results, len(episodes), f"{domain} {ways}-way"))
                for num_rounds in rounds:
                    name = f"{domain}, {ways}-way, {num_rounds} per word ({num_rounds * ways} in all)"
                    rows[name] = {
                        column: [o.is_correct[column][num_rounds] for o in outcomes if column in o.is_correct]
                        for column in options.columns
                    }
    return rows


# the evaluator of a worker process, set once by its initialiser
_process_binding: list[Binding] = []


def _initialise(folder: Path, options: Options) -> None:
    model, tokenizer = load_served(folder, options.dtype, options.weight_format)
    _process_binding.append(
        Binding(model, tokenizer, Catalogue(options.data), load_likeness(folder), load_prior(folder))
    )


def _judge(task: tuple[Episode, tuple[int, ...], tuple[str, ...]]) -> Outcome:
    return _process_binding[0].judge(*task)


def naming_table(naming: Naming, count: int, seed: int) -> dict[str, dict[str, Share]]:
    cases = naming.cases(count, NAMING_WAYS, seed)
    rows = {}
    for name, caption in (("names", False), ("captions", True)):
        rows[f"{name} of unseen images, {NAMING_WAYS} candidates"] = {
            column: share([naming.is_named(row, labels, caption=caption, blind=blind) for row, labels in cases])
            for column, blind in (("model", False), ("blind", True))
        }
    return rows


def perplexities(folder: Path, tokenizer: PromptTokenizer) -> dict[str, float]:
    """Return the perplexities of the frozen language model alone and with the bridge as served, without media.

    A served model's gates are folded into its weights.
    """
    ids = tokenizer.encode_plain(TEXT.read_text(encoding="utf-8"))[:1024]
    alone, served = (load_folder(folder, "cpu", torch.float32) for _ in range(2))
    alone.gated.clear()
    served.fold_gates()
    return {"language model alone": perplexity(alone, ids), "with the bridge, no media": perplexity(served, ids)}


def _report_progress(outcomes: Iterable[Outcome], count: int, name: str) -> Iterator[Outcome]:
    started = time.monotonic()
    for number, outcome in enumerate(outcomes, 1):
        yield outcome
        if number % 50 == 0:
            print(f"{name}: {number} of {count}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def format_table(rows: dict[str, dict[str, Share]], columns: tuple[str, ...], chance: bool) -> str:
    head = ("", *columns, *(("chance",) if chance else ()))
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, cells in rows.items():
        row = [str(cells[column]) for column in columns]
        if chance:
            row.append(f"{1 / int(name.split(', ')[1].removesuffix('-way')):.2f}")
        lines.append(f"| {' | '.join((name, *row))} |")
    return "\n".join(lines)


def format_methods(rows: AnswersByRow) -> str:
    """Return the table of the accuracy of `auto` minus that of the best single method of the row."""
    methods = (IN_CONTEXT, *METHODS, BLEND, AUTO)
    lines = ["| | auto less the best single method |", "|---|---|"]
    for name, answers in rows.items():
        lines.append(f"| {name} | {difference_to_best({m: answers[m] for m in methods if m in answers}, AUTO)} |")
    return "\n".join(lines)


def measure(options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.processes)
    folder = options.model or prepare()
    catalogue = Catalogue(options.data)
    answers = binding_table(catalogue, options, folder)
    binding_rows = {name: {column: share(of) for column, of in row.items()} for name, row in answers.items()}
    print(format_table(binding_rows, options.columns, chance=True), "\n", flush=True)
    print(format_methods(answers), "\n", flush=True)
    if options.encoder_only:
        return {"episodes": options.episodes, "shares": share_values(binding_rows)}
    model, tokenizer = load_served(folder, options.dtype, options.weight_format)
    naming = Naming(model, tokenizer, catalogue)
    naming_rows = naming_table(naming, options.episodes, options.seed)
    print(
        format_table(naming_rows, ("model", "blind"), chance=False),
        f"(chance {1 / NAMING_WAYS:.2f})\n",
        sep="\n",
        flush=True,
    )
    style = share([naming.keeps_style(number, options.seed) for number in range(max(12, options.episodes // 5))])
    print(f"third caption in the style of the first two: {style}\n", flush=True)
    text = perplexities(folder, tokenizer)
    print("\n".join(f"perplexity, {name}: {value:.3f}" for name, value in text.items()), "\n", flush=True)
    return {
        "episodes": options.episodes,
        "seed": options.seed,
        "controls": options.controls,
        "dtype": options.dtype,
        "weight_format": options.weight_format,
        "shares": share_values({**binding_rows, **naming_rows}),
        "style": style.value,
        "perplexity": text,
    }


def share_values(rows: dict[str, dict[str, Share]]) -> dict[str, dict[str, float]]:
    return {name: {column: cell.value for column, cell in cells.items()} for name, cells in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.default", description=__doc__)
    parser.add_argument("--episodes", type=at_least(1), default=500, help="episodes per row (default: 500)")
    parser.add_argument(
        "--controls",
        type=at_least(0),
        help="episodes that are also judged shuffled, blind and with real names (default: all)",
    )
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    add_data_option(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the weights' dtype")
    parser.add_argument("--weight-format", choices=KINDS, help="the format in which a GPU would keep the weights")
    parser.add_argument(
        "--processes", type=at_least(1), default=2, help="worker processes, each with one thread and the model's 0.7 GB"
    )
    parser.add_argument(
        "--encoder-only", action="store_true", help="print the nearest means and the methods by likeness only"
    )
    parser.add_argument(
        "--domains", choices=DOMAINS, nargs="+", default=DOMAINS, help="the rows of the table (default: all)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the episodes (default: {SEED})")
    print(json.dumps(measure(Options(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
