"""The requests of a benchmark: its examples as a support set, and a few-shot completion or a classification per query."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.benchmark import Benchmark, Prompt, SelectionName
from evaluation.benchmarks.clips import media
from evaluation.benchmarks.items import Item, digest
from evaluation.benchmarks.scoring import METRICS
from flamboyance_client import (
    ApiError,
    AsyncClient,
    Example,
    NotFound,
    Query,
    Selection,
    SupportSet,
    Template,
    example,
    query,
)

NUM_BEAMS = 3
# far below the default limit of a request's body, 64 MiB
BATCH_BYTES = 8 * 2**20
BATCH_EXAMPLES = 64
UNFINISHED_SECONDS = 24 * 3600.0
LIFETIME_SECONDS = 14 * UNFINISHED_SECONDS

STRATEGIES = {"random": "random", "rices": "rices_image"}


async def register(
    client: AsyncClient, benchmark: Benchmark, items: Sequence[Item], report: Callable[[int], object]
) -> SupportSet:
    """Return a support set of the examples: the one that an earlier run has registered, or a new one.

    It gets its name when it is complete, and expires two weeks after the last run. `report` is called with the number of
    examples that are stored.
    """
    name = f"benchmark-{benchmark.name}-{digest(items)}"
    try:
        support_set = await client.support_sets.get(name)
    except NotFound:
        support_set = await client.support_sets.create(ttl_seconds=UNFINISHED_SECONDS)
        for batch in _batches(items, benchmark):
            try:
                support_set = await client.support_sets.put(support_set.id, batch)
            except ApiError as error:
                if (match := re.match(r"examples\[(\d+)\]", error.param or "")) is None:
                    raise
                raise error.about(str(items[int(batch[int(match[1])]["id"])].media)) from None
            report(len(batch))
    return await client.support_sets.update(support_set.id, name=name, ttl_seconds=LIFETIME_SECONDS)


def _batches(items: Sequence[Item], benchmark: Benchmark) -> Iterator[list[Example]]:
    batch: list[Example] = []
    num_bytes = 0
    for number, item in enumerate(items):
        stored = _example(item, number, benchmark)
        size = len(json.dumps(stored))
        if batch and (num_bytes + size > BATCH_BYTES or len(batch) == BATCH_EXAMPLES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(stored)
        num_bytes += size
    if batch:
        yield batch


def _example(item: Item, number: int, benchmark: Benchmark) -> Example:
    """Return an example with its answer, which is a label if candidates are ranked."""
    row = item.row
    answer, label = (row.shown_answer, None) if benchmark.task == "generate" else (None, row.shown_answer)
    stored = example(media(item), answer, label=label, question=row.question or None, id=str(number))
    if row.text:
        stored["text"] = row.text
    return stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Sends the queries of one run to a server, after `num_shots` examples of a support set."""

    client: AsyncClient
    benchmark: Benchmark
    prompt: Prompt
    support_set: SupportSet | None
    num_shots: int
    selection: SelectionName
    seed: int
    orders: int

    async def ask(self, item: Item) -> dict[str, Any]:
        """Return the outcome of a query as it is recorded."""
        question = await asyncio.to_thread(_query, item)
        if self.benchmark.task == "generate":
            return {"id": item.row.id, "text": await self._generate(question, item)}
        return {"id": item.row.id, "ranked": await self._rank(question, item)}

    async def _generate(self, question: Query, item: Item) -> str:
        reply = await self.client.fewshot.complete(
            question,
            **self._shots(item),
            template=self._template,
            max_tokens=self.prompt.max_tokens,
            use_beam_search=True,
            best_of=NUM_BEAMS,
            length_penalty=0.0,
            temperature=0.0,
        )
        return self.prompt.trim(reply.text)

    async def _rank(self, question: Query, item: Item) -> list[tuple[str, float]]:
        candidates = list(dict.fromkeys(item.row.candidates))
        num_ranked = METRICS[self.benchmark.metric].num_ranked
        answer = await self.client.classify(
            question,
            **self._shots(item),
            template=self._template,
            candidates=candidates,
            method="in_context",
            normalisation=self.prompt.normalisation,
            permutations=self.orders,
            seed=self._seed(item),
            top_k=min(num_ranked or len(candidates), len(candidates)),
        )
        return [(candidate.label, candidate.probability) for candidate in answer.candidates]

    @property
    def _template(self) -> Template:
        return {"shot": self.prompt.shot, "separator": self.prompt.separator}

    def _shots(self, item: Item) -> dict[str, Any]:
        """Return the fields that select the shots. Without shots, a prompt may have examples without their media."""
        count = self.num_shots or self.prompt.zero_shot_examples
        if self.support_set is None or count == 0:
            return {}
        selection = Selection(
            support_set=self.support_set.id,
            version=self.support_set.version,
            k=count,
            strategy=STRATEGIES[self.selection],  # type: ignore[typeddict-item]
            seed=self._seed(item),
        )
        return {"examples": selection, "zero_shot": self.num_shots == 0}

    def _seed(self, item: Item) -> int:
        """Return a seed that depends on the query, so that each query has other random shots."""
        text = f"{self.seed}/{item.row.id}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())


def _query(item: Item) -> Query:
    return query(media(item), text=item.row.text or None, question=item.row.question or None)
