"""Runs a benchmark against a server: concurrent queries, whose answers are recorded one by one, and their scores."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evaluation.benchmarks.attempts import Failures, repeat
from evaluation.benchmarks.benchmark import Benchmark, SelectionName, Wording
from evaluation.benchmarks.data import BenchmarkData, Queries
from evaluation.benchmarks.items import DataError, Item, digest
from evaluation.benchmarks.journal import Journal
from evaluation.benchmarks.journal import digest as settings_digest
from evaluation.benchmarks.registration import Draw, Registered, Registration
from evaluation.benchmarks.report import Report, Result
from evaluation.benchmarks.requests import Asker
from evaluation.benchmarks.scoring import METRICS, Score, answer
from flamboyance_client import (
    ApiError,
    AsyncClient,
    FlamboyanceError,
    NotAuthorised,
    Retries,
    SupportSet,
    TransportError,
    Unavailable,
    UnexpectedReply,
)

# a longer delay is reported, and one after each such number of tries
LONG_DELAY = 60.0
MANY_TRIES = 10
# seconds at most after a delay that the server states, per try and at all, so that rejected queries are not sent together
JITTER, MAX_JITTER = 0.1, 5.0
# of a model's name in the name of a report
MAX_NAME = 80
# after this number of failures without any answer, the other queries would probably fail, too
MAX_FIRST_FAILURES = 16


@dataclass(frozen=True, kw_only=True)
class Patience(Retries):
    """Retries after any delay that a server states, as often as it states one, and says so if this takes long."""

    limit: int = 5
    max_delay: float = math.inf

    def delay(self, tries: int, error: FlamboyanceError, *, can_run_twice: bool = True) -> float | None:
        if not isinstance(error, Unavailable) or error.retry_after is None:
            return super().delay(tries, error, can_run_twice=can_run_twice)
        if (seconds := super().delay(1, error, can_run_twice=can_run_twice)) is None:
            return None
        if seconds > LONG_DELAY or tries % MANY_TRIES == 0:
            print(f"the next try is in {seconds:.0f} s, as the server asks: {error}", file=sys.stderr)
        return seconds + random.uniform(0, min(tries * JITTER, MAX_JITTER))


RETRIES = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    data: Path
    server: str
    api_key: str | None
    out: Path
    shots: Sequence[int]
    selection: SelectionName
    wording: Wording
    split: str
    support: int | None
    limit: int | None
    ensemble: bool
    seed: int
    concurrency: int


class Run:
    """A run of a benchmark with several numbers of shots, against one server."""

    def __init__(self, benchmark: Benchmark, options: Options, client: AsyncClient) -> None:
        self.benchmark, self.options, self._client = benchmark, options, client
        self._progress = progress()
        self._prompt = benchmark.prompt(options.wording)
        if options.ensemble and benchmark.orders == 1:
            raise ValueError(f"--ensemble is for ranked candidates, and the answers of {benchmark.title} are written")

    async def run(self) -> Report:
        """Answer all queries, continuing earlier runs with the same settings, and return the report."""
        options = self.options
        data = BenchmarkData(self.benchmark, options.data)
        queries = data.queries(options.split, options.limit, options.seed)
        METRICS[self.benchmark.metric].check([item.row for item in queries.items if item.row.answers])
        draw = partial(data.support, options.support, options.seed)
        if self._needs_examples:
            self._check_split()
            self._check_count(len(draw(())))
        if not (models := await self._client.models()):
            raise ValueError(f"{options.server} serves no model")
        self._create_folder()
        with self._progress:
            registered = await self._register(draw) if self._needs_examples else None
            settings = self._settings(models[0].id, queries.items, registered)
            support_set = registered.support_set if registered else None
            results = [await self._run(shots, settings, queries, support_set) for shots in options.shots]
        common = {name: getattr(options, name) for name in ("wording", "selection", "seed", "limit", "ensemble")}
        return Report(
            benchmark=self.benchmark,
            model=models[0].id,
            split=options.split,
            selection=options.selection,
            settings={**common, "support": support_set.num_examples if support_set else 0},
            num_left_out=registered.num_left_out if registered else 0,
            results=results,
        )

    def _create_folder(self) -> None:
        """Create the folder of the results before any example is sent. Raises ValueError."""
        try:
            self.options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out: the folder {self.options.out} cannot be created: {error.strerror}") from None

    @property
    def _needs_examples(self) -> bool:
        has_texts = self._prompt.zero_shot_examples > 0 and self.benchmark.support_split is not None
        return any(self.options.shots) or has_texts

    def _check_split(self) -> None:
        if (split := self.options.split) == self.benchmark.support_split:
            queried = ", ".join(name for name in self.benchmark.splits if name != split)
            raise ValueError(
                f"--split {split}: examples are selected from this split, so a query could be its own example; "
                f"choose another split of {self.benchmark.title}: {queried}"
            )

    def _check_count(self, num_examples: int) -> None:
        has_texts = 0 in self.options.shots
        count = max(*self.options.shots, self._prompt.zero_shot_examples if has_texts else 0)
        if count > num_examples:
            what = f"{count} shots" if count in self.options.shots else f"0 shots with {count} examples without media"
            raise ValueError(f"{what} need as many examples, and there are {num_examples}")

    async def _register(self, draw: Draw) -> Registered:
        task = self._progress.add_task(f"{self.benchmark.title}, examples", total=len(draw(())))
        registration = Registration(self._client, self.benchmark, partial(self._progress.advance, task), self._print)
        registered = await registration.register(draw)
        # a set of an earlier run has all examples from the start, and one whose unusable rows are left out may have fewer
        num_examples = registered.support_set.num_examples
        self._progress.update(task, total=num_examples, completed=num_examples)
        self._check_count(num_examples)
        return registered

    def _print(self, message: str) -> None:
        self._progress.console.print(message, markup=False, soft_wrap=True)

    def _settings(self, model: str, queries: Sequence[Item], registered: Registered | None) -> dict[str, Any]:
        options = self.options
        return {
            "benchmark": self.benchmark.name,
            "model": model,
            "prompt": self._prompt.model_dump(mode="json"),
            "split": options.split,
            "queries": digest(queries),
            "support": registered.digest if registered else digest([]),
            "selection": options.selection,
            "orders": self._orders,
            "seed": options.seed,
        }

    @property
    def _orders(self) -> int:
        return self.benchmark.orders if self.options.ensemble else 1

    async def _run(
        self, shots: int, settings: dict[str, Any], queries: Queries, support_set: SupportSet | None
    ) -> Result:
        asker = Asker(
            client=self._client,
            benchmark=self.benchmark,
            prompt=self._prompt,
            support_set=support_set,
            num_shots=shots,
            selection=self.options.selection,
            seed=self.options.seed,
            orders=self._orders,
        )
        if not shots and not self._prompt.zero_shot_examples:
            settings = {**settings, "support": digest([])}
        with Journal(self.options.out, f"{self.benchmark.name}-{shots}-shots", {**settings, "shots": shots}) as journal:
            await self._ask_all(asker, queries.items, journal)
            num_answers = sum(item.row.id in journal.outcomes for item in queries.items)
        score, problem = self._score(journal, queries.items)
        self._write_submission(journal, queries.items)
        return Result(
            shots=shots,
            score=score,
            problem=problem,
            num_answers=num_answers,
            num_missing=queries.num_missing,
            num_failed=len(queries.items) - num_answers,
            journal=journal.path.name,
        )

    async def _ask_all(self, asker: Asker, items: Sequence[Item], journal: Journal) -> None:
        """Send the queries without an answer, a few at a time; stop if the first ones all fail."""
        pending = [item for item in items if item.row.id not in journal.outcomes]
        task = self._progress.add_task(
            f"{self.benchmark.title}, {asker.num_shots} shots", total=len(items), completed=len(items) - len(pending)
        )
        failures = Failures()
        remaining = iter(pending)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.options.concurrency, len(pending))):
                group.create_task(self._work(asker, remaining, journal, failures, task))
        if num_not_asked := sum(1 for _ in remaining):
            self._print(f"{asker.num_shots} shots: the first queries failed, {num_not_asked} others were not asked")

    async def _work(
        self, asker: Asker, items: Iterator[Item], journal: Journal, failures: Failures, task: TaskID
    ) -> None:
        for item in items:
            try:
                journal.write(await repeat(partial(asker.ask, item)))
                failures.end_row()
            except NotAuthorised:
                raise
            except (ApiError, DataError, TransportError, UnexpectedReply) as error:
                self._print(f"{item.row.where}: {error}")
                failures.add(error)
            self._progress.advance(task)
            if failures.num_failed >= MAX_FIRST_FAILURES and not journal.outcomes:
                return

    def _score(self, journal: Journal, items: Sequence[Item]) -> tuple[Score | None, str | None]:
        """Return the score, or why it cannot be computed; neither if the split has no public answers."""
        rows = [item.row for item in items if item.row.id in journal.outcomes]
        if not rows or not all(row.answers for row in rows):
            return None, None
        try:
            return METRICS[self.benchmark.metric].score([answer(row, journal.outcomes[row.id]) for row in rows]), None
        except ValueError as error:
            return None, str(error)

    def _write_submission(self, journal: Journal, items: Sequence[Item]) -> None:
        """Write the answers in the form of official results: a table if it has probabilities, else JSON."""
        columns = self.benchmark.submission
        outcomes = [journal.outcomes[item.row.id] for item in items if item.row.id in journal.outcomes]
        has_probabilities = len(columns) == 3
        rows = [
            dict(zip(columns, _official(outcome, has_probabilities=has_probabilities), strict=True))
            for outcome in outcomes
        ]
        if not has_probabilities:
            journal.path.with_suffix(".results.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
            return
        with journal.path.with_suffix(".results.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)


def _official(outcome: Mapping[str, Any], *, has_probabilities: bool) -> tuple[str | int | float, ...]:
    """Return the id and the answer of a query, or its id, the probability of yes, and 1 or 0."""
    number, ranked = _number(outcome["id"]), outcome.get("ranked", ())
    if has_probabilities:
        return number, dict(ranked)["yes"], int(ranked[0][0] == "yes")
    return number, outcome["text"] if "text" in outcome else ranked[0][0]


def _number(text: str) -> str | int:
    return int(text) if text.isdecimal() and str(int(text)) == text else text


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


async def run(benchmark: Benchmark, options: Options) -> Report:
    """Run a benchmark, and write its report next to the answers."""
    async with AsyncClient(options.server, api_key=options.api_key, retries=RETRIES) as client:
        report = await Run(benchmark, options, client).run()
    name = report_name(benchmark, options, report.model)
    (options.out / f"{name}.json").write_text(json.dumps(report.values(), indent=2) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text(report.markdown(), encoding="utf-8")
    return report


def report_name(benchmark: Benchmark, options: Options, model: str) -> str:
    """Return the name of a report: those of the benchmark and the model, and the settings that are not the defaults."""
    words = [
        _file_name(model),
        *([options.selection] if options.selection != "random" else []),
        *([options.wording] if options.wording != "paper" else []),
        *([options.split] if options.split != benchmark.split else []),
        *([f"support-{options.support}"] if options.support is not None else []),
        *([f"limit-{options.limit}"] if options.limit is not None else []),
        *(["ensemble"] if options.ensemble else []),
        *([f"seed-{options.seed}"] if options.seed else []),
    ]
    return "-".join([benchmark.name, *words])


def _file_name(model: str) -> str:
    """Return the name of a model as a part of a file's name, with a digest if it cannot have all of its characters."""
    name = re.sub(r"[^\w.-]+", "-", model, flags=re.ASCII)[:MAX_NAME]
    return name if name == model else f"{name}-{settings_digest({'model': model})}"
