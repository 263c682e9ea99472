"""The requests of a benchmark's queries: a few-shot completion or a classification for each."""

from __future__ import annotations

import asyncio
import hashlib
import math
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.benchmark import Benchmark, Prompt, SelectionName
from evaluation.benchmarks.clips import media
from evaluation.benchmarks.items import DataError, Item
from evaluation.benchmarks.scoring import METRICS
from flamboyance_client import AsyncClient, Query, Selection, SupportSet, Template, UnexpectedReply, query

NUM_BEAMS = 3

STRATEGIES = {"random": "random", "rices": "rices_image"}


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
        ranked = [(candidate.label, candidate.probability) for candidate in answer.candidates]
        if not ranked or not all(map(_is_finite, ranked)):
            raise UnexpectedReply(f"expected candidates with probabilities, got {ranked!r:.200}")
        return ranked

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


def _is_finite(candidate: tuple[str, Any]) -> bool:
    _, probability = candidate
    return isinstance(probability, int | float) and math.isfinite(probability)


def _query(item: Item) -> Query:
    row = item.row
    row.check_texts()
    try:
        return query(media(item), text=row.text or None, question=row.question or None)
    except (OSError, ValueError) as error:  # the file cannot be read
        raise DataError(str(error)) from None
