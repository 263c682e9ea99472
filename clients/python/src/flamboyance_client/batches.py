"""Classification of many queries: a bounded number of requests at a time, and results in the order of the queries.

If a query fails, the others continue. An error that every query would have ends the sending: it is raised if no query has
succeeded, and otherwise it is the result of the queries that were not sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Literal, get_args

from flamboyance_client.errors import ApiError, FlamboyanceError, NotAuthorised, NotConnected, NotFound, QueriesFailed
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.progress import visible_bar
from flamboyance_client.prompt import checked_list
from flamboyance_client.records import Classification

Outcome = Classification | Exception
OnError = Literal["raise", "return"]
Done = SimpleQueue[tuple[int, Outcome] | BaseException | None]
Show = Callable[[Outcome], None]

CONCURRENCY = 8
# httpx opens at most so many connections to a server.
MAX_CONCURRENCY = 100
QUERIES = "queries must be a list, which media_files(folder) returns of the images and videos in a folder"
# codes of the set and of the route; a 404 without a code is that of another server
MISSING_FOR_ALL = ("support_set_not_found", "not_found", None)
FAILURES = (FlamboyanceError, OSError, TypeError, ValueError)


def checked_queries(queries: Iterable[AnyQuery], concurrency: int, on_error: OnError = "raise") -> list[AnyQuery]:
    """Return the queries as a list. Raises `TypeError` for a single query, and `ValueError` for another wrong argument."""
    items = checked_list(queries, QUERIES)
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be 'raise' or 'return', not {on_error!r}")
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ValueError(f"concurrency must be 1 to {MAX_CONCURRENCY}, not {concurrency}")
    return items


@dataclass(slots=True)
class Outcomes:
    """The outcomes of queries by their index. An error that every query would have is the `end` of the sending.

    `show` is called with each outcome in the order of the queries, as soon as all before it are known.
    """

    num_queries: int
    show: Show
    end: Exception | None = None
    _by_index: dict[int, Outcome] = field(default_factory=dict)
    _num_shown: int = 0

    def add(self, index: int, outcome: Outcome) -> None:
        self._by_index[index] = outcome
        if self.end is None and isinstance(outcome, Exception) and _is_of_every_query(outcome):
            self.end = outcome
        while self._num_shown in self._by_index:
            self._show(self._by_index[self._num_shown])

    def _show(self, outcome: Outcome) -> None:
        self._num_shown += 1
        self.show(outcome)

    def results(self) -> list[Outcome]:
        """Return the outcomes in order. Queries that were not sent have the error that ended the sending.

        Raises this error if no query has succeeded.
        """
        if self.end is None:
            return [self._by_index[index] for index in range(self.num_queries)]
        if not any(isinstance(outcome, Classification) for outcome in self._by_index.values()):
            raise self.end
        results = [self._by_index.get(index, self.end) for index in range(self.num_queries)]
        for outcome in results[self._num_shown :]:
            self._show(outcome)
        return results


def run_all(
    send: Callable[[AnyQuery], Classification],
    queries: list[AnyQuery],
    concurrency: int,
    end_requests: Callable[[], None],
    show: Show = lambda outcome: None,
) -> list[Outcome]:
    """Return the results of all queries in order, with an error for each that failed.

    An interrupt, such as Ctrl-C, ends the running requests by `end_requests`, and waits for none of them.
    """
    outcomes = Outcomes(len(queries), show)
    remaining, done = deque(enumerate(queries)), Done()
    workers: list[Thread] = []
    try:
        with visible_bar(len(queries), "classification", "query") as bar:
            workers += [_worker(send, remaining, done) for _ in queries[:concurrency]]
            num_running = len(workers)
            while num_running:
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    num_running -= 1
                    continue
                outcomes.add(*result)
                bar.update()
    except Exception:
        remaining.clear()
        for worker in workers:
            worker.join()
        raise
    except BaseException:
        remaining.clear()
        end_requests()
        raise
    return outcomes.results()


def _worker(send: Callable[[AnyQuery], Classification], remaining: deque[tuple[int, AnyQuery]], done: Done) -> Thread:
    """Start a thread that sends the remaining queries, and then puts None. The end of the process does not wait for it.

    An error that every query would have, and one that is not expected, ends all threads.
    """

    def work() -> None:
        try:
            for index, query in _taken(remaining):
                try:
                    done.put((index, send(query)))
                except FAILURES as error:
                    if _is_of_every_query(error):
                        remaining.clear()
                    done.put((index, error))
        except BaseException as error:
            remaining.clear()
            done.put(error)
        finally:
            done.put(None)

    worker = Thread(target=work, daemon=True)
    worker.start()
    return worker


def _taken(remaining: deque[tuple[int, AnyQuery]]) -> Iterator[tuple[int, AnyQuery]]:
    """Yield the remaining queries, which other threads take, too."""
    with suppress(IndexError):
        while True:
            yield remaining.popleft()


async def run_all_async(
    send: Callable[[AnyQuery], Awaitable[Classification]], queries: list[AnyQuery], concurrency: int
) -> list[Outcome]:
    """Do the same as `run_all` with asyncio."""
    outcomes = Outcomes(len(queries), lambda outcome: None)
    remaining = deque(enumerate(queries))
    with visible_bar(len(queries), "classification", "query") as bar:

        async def work() -> None:
            while remaining:
                index, query = remaining.popleft()
                try:
                    outcomes.add(index, await send(query))
                except FAILURES as error:
                    outcomes.add(index, error)
                if outcomes.end is not None:
                    remaining.clear()
                bar.update()

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return outcomes.results()


def classifications(outcomes: list[Outcome], queries: list[AnyQuery]) -> list[Classification]:
    """Return the results of queries none of which failed. Raises `QueriesFailed` for any others."""
    failures = [(index, outcome) for index, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
    if failures:
        index, error = failures[0]
        message = (
            f"{len(failures)} of {len(outcomes)} queries failed; the first is {_name(queries[index], index)}: {error}"
        )
        raise QueriesFailed(message, outcomes) from error
    return [outcome for outcome in outcomes if isinstance(outcome, Classification)]


def _is_of_every_query(error: Exception) -> bool:
    return isinstance(error, NotConnected | NotAuthorised) or (isinstance(error, ApiError) and _is_about_options(error))


def _is_about_options(error: ApiError) -> bool:
    if error.code == "context_length_exceeded":
        return False  # the shots and the texts of another query may be shorter
    is_missing = isinstance(error, NotFound) and error.code in MISSING_FOR_ALL
    return is_missing or not (error.param or "query").startswith("query")


def _name(query: AnyQuery, index: int) -> str:
    return str(query) if isinstance(query, str | Path) else f"queries[{index}]"
