"""`python -m evaluation.default`: the default model's tables, in process, from its folder and the cached features.

Held-out categories by likelihood ranking; the same prompts shuffled and blind; nearest mean; names, captions, style, and
the text's perplexity. Progress goes to standard error, the tables to standard output; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from evaluation.binding import VARIANTS, Binding, Episode, Outcome, make_episodes
from evaluation.intervals import Share, share
from evaluation.naming import Naming, perplexity
from model.checkpoint.native import load_folder
from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from model.zoo.default import prepare
from training.default.catalogue import Catalogue

SEED = 17
DATA = Path.home() / ".cache" / "flamboyance" / "default-data"
TEXT = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
# ways -> rounds of shots behind which a query branches off; 30 shots in all are six rounds of five words
ROUNDS = {2: (1, 2, 5), 5: (1, 2, 5, 6)}
KIND_ROUNDS = {5: (1, 2)}
NEAREST = "nearest mean"
NAMING_WAYS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    episodes: int
    controls: int | None
    model: Path | None
    data: Path
    processes: int
    dtype: str
    encoder_only: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        return () if self.encoder_only else VARIANTS

    def variants_of(self, number: int) -> tuple[str, ...]:
        """Those that the number-th episode is judged by."""
        return self.variants if self.controls is None or number < self.controls else self.variants[:1]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.variants, NEAREST)


def binding_table(catalogue: Catalogue, options: Options, folder: Path) -> dict[str, dict[str, Share]]:
    """Rows "drawings, 5-way, 1 a word (5 in all)" -> columns."""
    rows: dict[str, dict[str, Share]] = {}
    domains = (
        ("drawings", catalogue.held_out_labels, ROUNDS),
        ("photographs", catalogue.photographs, ROUNDS),
        ("kinds of drawings", catalogue.held_out_kinds, KIND_ROUNDS),
    )
    begin = (folder, options)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), _begin, begin) as pool:
        for domain, categories, ways_of in domains:
            for ways, rounds in ways_of.items():
                episodes = make_episodes(categories, ways, max(rounds), options.episodes, SEED)
                tasks = [(one, rounds, options.variants_of(number)) for number, one in enumerate(episodes)]
                judged = pool.map(_judge, tasks, chunksize=5)
                outcomes = list(_watched(judged, len(episodes), f"{domain} {ways}-way"))
                for turn in rounds:
                    name = f"{domain}, {ways}-way, {turn} a word ({turn * ways} in all)"
                    rows[name] = {
                        column: share([one.right[column][turn] for one in outcomes if column in one.right])
                        for column in options.columns
                    }
    return rows


# what a process judges with
_binding: list[Binding] = []


def _begin(folder: Path, options: Options) -> None:
    torch.set_num_threads(1)
    model = _served(folder, options)
    _binding.append(Binding(model, PromptTokenizer.load(folder, model.config.prompt), Catalogue(options.data)))


def _served(folder: Path, options: Options) -> Flamingo:
    model = load_folder(folder, "cpu", getattr(torch, options.dtype))
    model.fold_gates()
    return model


def _judge(task: tuple[Episode, tuple[int, ...], tuple[str, ...]]) -> Outcome:
    return _binding[0].judge(*task)


def naming_table(naming: Naming, count: int) -> dict[str, dict[str, Share]]:
    cases = naming.cases(count, NAMING_WAYS, SEED)
    rows = {}
    for name, caption in (("names", False), ("captions", True)):
        rows[f"{name} of unseen images, {NAMING_WAYS} candidates"] = {
            column: share([naming.is_named(row, labels, caption=caption, blind=blind) for row, labels in cases])
            for column, blind in (("model", False), ("blind", True))
        }
    return rows


def perplexities(folder: Path, tokenizer: PromptTokenizer) -> dict[str, float]:
    """The frozen language model's own, and with the bridge as it is served: gates folded, no media in the prompt."""
    ids = tokenizer.encode_plain(TEXT.read_text(encoding="utf-8"))[:1024]
    alone, served = (load_folder(folder, "cpu", torch.float32) for _ in range(2))
    alone.gated.clear()
    served.fold_gates()
    return {"language model alone": perplexity(alone, ids), "with the bridge, no media": perplexity(served, ids)}


def _watched(outcomes: Iterable[Outcome], count: int, name: str) -> Iterator[Outcome]:
    began = time.monotonic()
    for number, outcome in enumerate(outcomes, 1):
        yield outcome
        if number % 50 == 0:
            print(f"{name}: {number} of {count}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def table(rows: dict[str, dict[str, Share]], columns: tuple[str, ...], chance: bool) -> str:
    head = ("", *columns, *(("chance",) if chance else ()))
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, cells in rows.items():
        shown = [str(cells[column]) for column in columns]
        if chance:
            shown.append(f"{1 / int(name.split(', ')[1].removesuffix('-way')):.2f}")
        lines.append(f"| {' | '.join((name, *shown))} |")
    return "\n".join(lines)


def measure(options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.processes)
    folder = options.model or prepare()
    catalogue = Catalogue(options.data)
    bound = binding_table(catalogue, options, folder)
    print(table(bound, options.columns, chance=True), "\n", flush=True)
    if options.encoder_only:
        return {"episodes": options.episodes, "shares": values(bound)}
    model = _served(folder, options)
    tokenizer = PromptTokenizer.load(folder, model.config.prompt)
    naming = Naming(model, tokenizer, catalogue)
    named = naming_table(naming, options.episodes)
    print(table(named, ("model", "blind"), chance=False), f"(chance {1 / NAMING_WAYS:.2f})\n", sep="\n", flush=True)
    style = share([naming.keeps_style(number, SEED) for number in range(max(12, options.episodes // 5))])
    print(f"third caption in the style of the first two: {style}\n", flush=True)
    text = perplexities(folder, tokenizer)
    print("\n".join(f"perplexity, {name}: {value:.3f}" for name, value in text.items()), "\n", flush=True)
    shares = values({**bound, **named})
    told = {"episodes": options.episodes, "controls": options.controls, "dtype": options.dtype, "shares": shares}
    return {**told, "style": style.value, "perplexity": text}


def values(rows: dict[str, dict[str, Share]]) -> dict[str, dict[str, float]]:
    return {name: {column: cell.value for column, cell in cells.items()} for name, cells in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.default", description=__doc__)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument(
        "--controls", type=int, help="episodes that are shuffled, blind and with real names too (default: all)"
    )
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    parser.add_argument("--data", type=Path, default=DATA, help=f"what training.default_data made (default: {DATA})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights")
    parser.add_argument("--processes", type=int, default=2, help="each with one thread, and the model's 0.7 GB")
    parser.add_argument(
        "--encoder-only", action="store_true", help="nearest means alone: what the model is held against"
    )
    print(json.dumps(measure(Options(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
