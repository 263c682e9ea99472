"""`python -m evaluation.default`: the default model's tables, in process, from its folder and the cached features.

Held-out categories by likelihood ranking; the same prompts shuffled and blind; nearest mean; names, captions, style, and
the text's perplexity. Progress goes to standard error, the tables to standard output; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.binding import VARIANTS, Binding, make_episodes
from evaluation.intervals import Share, share
from evaluation.naming import Naming, perplexity
from model.checkpoint.native import load_folder
from model.tokenizer import PromptTokenizer
from model.zoo.default import prepare
from training.default.catalogue import Catalogue

SEED = 17
DATA = Path.home() / ".cache" / "flamboyance" / "default-data"
TEXT = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
# ways -> rounds of shots behind which a query branches off; 30 shots in all are six rounds of five words
ROUNDS = {2: (1, 2, 5), 5: (1, 2, 5, 6)}
NEAREST = "nearest mean"
NAMING_WAYS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    episodes: int
    model: Path | None
    data: Path
    threads: int
    encoder_only: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        return () if self.encoder_only else VARIANTS

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.variants, NEAREST)


def binding_table(binding: Binding, options: Options) -> dict[str, dict[str, Share]]:
    """Rows "drawings, 5-way, 1 a word (5 in all)" -> columns."""
    catalogue = binding.catalogue
    rows: dict[str, dict[str, Share]] = {}
    for domain, categories in (("drawings", catalogue.held_out_labels), ("photographs", catalogue.photographs)):
        for ways, rounds in ROUNDS.items():
            episodes = make_episodes(categories, ways, max(rounds), options.episodes, SEED)
            answers: dict[int, dict[str, list[bool]]] = {turn: defaultdict(list) for turn in rounds}
            for episode in _watched(episodes, f"{domain} {ways}-way"):
                for column, by_round in binding.judge(episode, rounds, options.variants).right.items():
                    for turn, is_right in by_round.items():
                        answers[turn][column].append(is_right)
            for turn in rounds:
                name = f"{domain}, {ways}-way, {turn} a word ({turn * ways} in all)"
                rows[name] = {column: share(answers[turn][column]) for column in options.columns}
    return rows


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


def _watched(episodes: list[Any], name: str) -> Any:
    began = time.monotonic()
    for number, episode in enumerate(episodes):
        yield episode
        if (number + 1) % 50 == 0:
            print(f"{name}: {number + 1} of {len(episodes)}, {time.monotonic() - began:.0f} s", file=sys.stderr)


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
    torch.set_num_threads(options.threads)
    folder = options.model or prepare()
    model = load_folder(folder, "cpu", torch.float32)
    model.fold_gates()
    tokenizer = PromptTokenizer.load(folder, model.config.prompt)
    catalogue = Catalogue(options.data)
    naming = Naming(model, tokenizer, catalogue)
    bound = binding_table(Binding(model, tokenizer, catalogue), options)
    print(table(bound, options.columns, chance=True), "\n", flush=True)
    if options.encoder_only:
        return {"episodes": options.episodes, "shares": values(bound)}
    named = naming_table(naming, options.episodes)
    print(table(named, ("model", "blind"), chance=False), f"(chance {1 / NAMING_WAYS:.2f})\n", sep="\n", flush=True)
    style = share([naming.keeps_style(number, SEED) for number in range(max(12, options.episodes // 5))])
    print(f"third caption in the style of the first two: {style}\n", flush=True)
    text = perplexities(folder, tokenizer)
    print("\n".join(f"perplexity, {name}: {value:.3f}" for name, value in text.items()), "\n", flush=True)
    shares = values({**bound, **named})
    return {"episodes": options.episodes, "shares": shares, "style": style.value, "perplexity": text}


def values(rows: dict[str, dict[str, Share]]) -> dict[str, dict[str, float]]:
    return {name: {column: cell.value for column, cell in cells.items()} for name, cells in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.default", description=__doc__)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    parser.add_argument("--data", type=Path, default=DATA, help=f"what training.default_data made (default: {DATA})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--encoder-only", action="store_true", help="nearest means alone: what the model is held against"
    )
    print(json.dumps(measure(Options(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
