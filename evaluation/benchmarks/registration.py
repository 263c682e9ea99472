"""Registers the examples of a benchmark as a support set, which later runs with the same examples use again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from evaluation.benchmarks.attempts import repeat
from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.clips import media
from evaluation.benchmarks.items import DataError, Item, digest
from flamboyance_client import (
    ApiError,
    AsyncClient,
    BadRequest,
    Conflict,
    Example,
    FlamboyanceError,
    NotFound,
    SupportSet,
    example,
)

# far below the default limit of a request's body, 64 MiB
BATCH_BYTES = 8 * 2**20
BATCH_EXAMPLES = 64
UNFINISHED_SECONDS = 24 * 3600.0
LIFETIME_SECONDS = 14 * UNFINISHED_SECONDS
# after this number of unusable examples without any stored one, the others would probably be unusable, too
MAX_FIRST_UNUSABLE = 16

# returns the examples of a run without those that are unusable, which are named by their rows' `where`
Draw = Callable[[Collection[str]], Sequence[Item]]


@dataclass(frozen=True, slots=True)
class Registered:
    """A support set, the digest of its examples, and how many rows were left out because they cannot be used."""

    support_set: SupportSet
    digest: str
    num_left_out: int


@dataclass(slots=True)
class Registration:
    """Stores examples in a support set, and replaces those that cannot be used by the next rows.

    `report` is called with the number of examples that are stored, and `warn` with a message per unusable one.
    """

    client: AsyncClient
    benchmark: Benchmark
    report: Callable[[int], object]
    warn: Callable[[str], object]
    _stored: dict[str, Item] = field(default_factory=dict)
    _unusable: dict[str, str] = field(default_factory=dict)

    async def register(self, draw: Draw) -> Registered:
        """Return a support set of the examples: the one that an earlier run has registered, or a new one.

        It gets its name when it is complete, and expires two weeks after the last run. A set that was changed since then
        loses its name to a new one.
        """
        name = f"benchmark-{self.benchmark.name}-{digest(draw(()))}"
        if (earlier := await self._find(name)) is not None:
            if (registered := _registered(earlier)) is not None:
                await self.client.support_sets.update(earlier.id, ttl_seconds=LIFETIME_SECONDS)
                return registered
            await self.client.support_sets.update(earlier.id, name=None)
        created = await self._store(draw)
        stored = digest(list(self._stored.values()))
        metadata = {"version": created.version, "examples": stored, "left_out": len(self._unusable)}
        try:
            await self.client.support_sets.update(
                created.id, name=name, ttl_seconds=LIFETIME_SECONDS, metadata=metadata
            )
        except Conflict:
            # another run has registered the same examples at the same time
            if (earlier := await self._find(name)) is None or (registered := _registered(earlier)) is None:
                raise
            await self.client.support_sets.delete(created.id)
            return registered
        return Registered(created, stored, len(self._unusable))

    async def _find(self, name: str) -> SupportSet | None:
        try:
            return await self.client.support_sets.get(name)
        except NotFound:
            return None

    async def _store(self, draw: Draw) -> SupportSet:
        support_set = await self.client.support_sets.create(ttl_seconds=UNFINISHED_SECONDS)
        numbers = count()
        try:
            while new := [item for item in draw(self._unusable) if item.row.where not in self._stored]:
                for batch in self._batches(new, numbers):
                    support_set = await self._put(support_set, batch)
        except Exception:
            with suppress(FlamboyanceError):
                await self.client.support_sets.delete(support_set.id)
            raise
        return support_set

    async def _put(self, support_set: SupportSet, batch: list[tuple[Item, Example]]) -> SupportSet:
        """Store a batch without the examples that the server refuses."""
        while batch:
            try:
                # the examples have ids, so to store them again changes nothing
                examples = [stored for _, stored in batch]
                support_set = await repeat(partial(self.client.support_sets.put, support_set.id, examples))
                break
            except BadRequest as error:
                item, _ = batch.pop(_refused(error, len(batch)))
                self._leave_out(item, error.about(str(item.media)))
        self._stored |= {item.row.where: item for item, _ in batch}
        self.report(len(batch))
        return support_set

    def _leave_out(self, item: Item, error: ApiError | DataError) -> None:
        self._unusable[item.row.where] = str(error)
        if not self._stored and len(self._unusable) >= MAX_FIRST_UNUSABLE:
            raise error
        self.warn(f"{item.row.where}, an example that is left out: {error}")

    def _batches(self, items: Sequence[Item], numbers: Iterator[int]) -> Iterator[list[tuple[Item, Example]]]:
        batch: list[tuple[Item, Example]] = []
        num_bytes = 0
        for item in items:
            try:
                stored = _example(item, next(numbers), self.benchmark)
            except DataError as error:
                self._leave_out(item, error)
                continue
            size = len(json.dumps(stored))
            if batch and (num_bytes + size > BATCH_BYTES or len(batch) == BATCH_EXAMPLES):
                yield batch
                batch, num_bytes = [], 0
            batch.append((item, stored))
            num_bytes += size
        if batch:
            yield batch


def _registered(support_set: SupportSet) -> Registered | None:
    """Return a complete set as it was registered, or None for one that was changed since then."""
    match support_set.raw.get("metadata"):
        case {"version": support_set.version, "examples": str(examples), "left_out": int(num_left_out)}:
            return Registered(support_set, examples, num_left_out)
    return None


def _refused(error: ApiError, size: int) -> int:
    """Return the index of the example that the server refuses; raises the error if it is about none of them."""
    if match := re.match(r"examples\[(\d+)\]", error.param or ""):
        return int(match[1])
    if size == 1 and error.code == "body_too_large":
        return 0
    raise error


def _example(item: Item, number: int, benchmark: Benchmark) -> Example:
    """Return an example with its answer, which is a label if candidates are ranked."""
    row = item.row
    answer, label = (row.shown_answer, None) if benchmark.task == "generate" else (None, row.shown_answer)
    row.check_texts()
    try:
        stored = example(media(item), answer, label=label, question=row.question or None, id=str(number))
    except (OSError, ValueError) as error:  # the file cannot be read
        raise DataError(str(error)) from None
    if row.text:
        stored["text"] = row.text
    return stored
