"""Classification of many queries: a bounded number of requests at a time, and results in the order of the queries.

If a query fails, the others continue, unless every query would have the same error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

from tqdm.auto import tqdm

from flamboyance_client.errors import ApiError, FlamboyanceError, NotAuthorised, NotConnected, QueriesFailed
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.prompt import checked_list
from flamboyance_client.records import Classification

Outcome = Classification | Exception
OnError = Literal["raise", "return"]
Done = SimpleQueue[tuple[int, Outcome] | BaseException]

CONCURRENCY = 8
# httpx opens at most so many connections to a server.
MAX_CONCURRENCY = 100
QUERIES = "queries must be a list, which media_files(folder) returns of the images and videos in a folder"
FAILURES = (FlamboyanceError, OSError, TypeError, ValueError)


def checked_queries(queries: Iterable[AnyQuery], concurrency: int) -> list[AnyQuery]:
    """Return the queries as a list. Raises `TypeError` for a single query, and `ValueError` for a wrong concurrency."""
    items = checked_list(queries, QUERIES)
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ValueError(f"concurrency must be 1 to {MAX_CONCURRENCY}, not {concurrency}")
    return items


def run_all(
    send: Callable[[AnyQuery], Classification],
    queries: list[AnyQuery],
    concurrency: int,
    end_requests: Callable[[], None],
) -> list[Outcome]:
    """Return the results of all queries in order, with an error for each that failed.

    An interrupt, such as Ctrl-C, ends the running requests by `end_requests`, and waits for none of them.
    """
    outcomes: dict[int, Outcome] = {}
    remaining, done = deque(enumerate(queries)), Done()
    workers: list[Thread] = []
    try:
        with _progress_bar(len(queries)) as bar:
            workers += [_worker(send, remaining, done) for _ in queries[:concurrency]]
            for _ in queries:
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                index, outcome = result
                outcomes[index] = outcome
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
    return [outcomes[index] for index in range(len(queries))]


def _worker(send: Callable[[AnyQuery], Classification], remaining: deque[tuple[int, AnyQuery]], done: Done) -> Thread:
    """Start a thread that sends the remaining queries. The end of the process does not wait for it.

    An error that every query would have, and one that is not expected, ends all threads.
    """

    def work() -> None:
        with suppress(IndexError):
            while True:
                index, query = remaining.popleft()
                try:
                    done.put((index, _outcome(send, query)))
                except BaseException as error:
                    remaining.clear()
                    done.put(error)

    worker = Thread(target=work, daemon=True)
    worker.start()
    return worker


async def run_all_async(
    send: Callable[[AnyQuery], Awaitable[Classification]], queries: list[AnyQuery], concurrency: int
) -> list[Outcome]:
    """Do the same as `run_all` with asyncio."""
    outcomes: dict[int, Outcome] = {}
    remaining = iter(enumerate(queries))
    with _progress_bar(len(queries)) as bar:

        async def work() -> None:
            for index, query in remaining:
                try:
                    outcomes[index] = await send(query)
                except FAILURES as error:
                    outcomes[index] = _of_one_query(error)
                bar.update()

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [outcomes[index] for index in range(len(queries))]


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


def _outcome(send: Callable[[AnyQuery], Classification], query: AnyQuery) -> Outcome:
    try:
        return send(query)
    except FAILURES as error:
        return _of_one_query(error)


def _of_one_query(error: Exception) -> Exception:
    """Return the error of one query. Raises the error if every query would have it."""
    if isinstance(error, NotConnected | NotAuthorised) or (isinstance(error, ApiError) and _is_about_options(error)):
        raise error
    return error


def _is_about_options(error: ApiError) -> bool:
    return error.code == "support_set_not_found" or not (error.param or "query").startswith("query")


def _name(query: AnyQuery, index: int) -> str:
    return str(query) if isinstance(query, str | Path) else f"queries[{index}]"


def _progress_bar(total: int) -> tqdm[Any]:
    """Return a progress bar that is visible in a notebook or on a terminal and nowhere else."""
    return tqdm(total=total, desc="classification", unit="query", disable=None)
