"""The blocking `Client` and the `AsyncClient` send the calls that `api` and `stored` build and parse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
)
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Unpack, overload
from weakref import finalize

import httpx

from flamboyance_client.accuracy import Accuracy, LabelledQueries, check_labels, labelled_queries, requests_by_method
from flamboyance_client.api import Api, Call, checked_selection, status_error, with_lists
from flamboyance_client.async_resources import AsyncEvaluations, AsyncFewShot, AsyncImages, AsyncSupportSets
from flamboyance_client.batches import CONCURRENCY, OnError, checked_queries, classifications, run_all, run_all_async
from flamboyance_client.connection import async_events, client_settings, events, request_arguments, transport_errors
from flamboyance_client.errors import FlamboyanceError, accuracies_kept
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.keys import AsyncKeys, Keys
from flamboyance_client.options import ClassifyOptions, EmbedOptions, InspectOptions, Method, Options, ScoreOptions
from flamboyance_client.processes import MadeAgain, PerScope, close, process, process_and_loop
from flamboyance_client.prompt import Part, Prompt
from flamboyance_client.records import Classification, Score
from flamboyance_client.replies import Completion, Health, Json, Model
from flamboyance_client.resources import Evaluations, FewShot, Images, SupportSets
from flamboyance_client.retries import Retries
from flamboyance_client.steps import run, run_async
from flamboyance_client.stored import SupportSetCalls
from flamboyance_client.traces import TracedClient, trace_async
from flamboyance_client.transfers import read_file, read_file_async, written_file

Reply = TypeVar("Reply")

# The read timeout is long, because the first token of a long prompt may take minutes.
TIMEOUT = httpx.Timeout(connect=5.0, read=600.0, write=60.0, pool=5.0)
RETRIES = Retries()


class Client(MadeAgain):
    """A client of one server. Its connections are closed at the end of a `with` block, by `close()`, or with the object.

    A process that is forked from one with a client makes connections of its own, unless `transport` has them.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float | httpx.Timeout = TIMEOUT,
        retries: Retries = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._api = Api(model=model)
        self._retries = retries
        self.fewshot = FewShot(self._api, self._send, self._stream)
        self.images = Images(self._send)
        self.support_sets = SupportSets(self._send, self._download, model)
        self.evaluations = Evaluations(self._send)
        self.keys = Keys(self._send)
        settings = client_settings(base_url, api_key, timeout)
        self._http = PerScope(lambda: TracedClient(transport=transport, **settings), process)
        finalize(self, close, self._http)

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        return self._send(self._api.complete(prompt, options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AbstractContextManager[Iterator[Completion]]:
        """Stream a completion: `with client.stream(...) as events: for event in events: ...`.

        Leaving the block early ends the generation.
        """
        return self._stream(self._api.complete(prompt, options, stream=True))

    @contextmanager
    def _stream(self, call: Call[Completion]) -> Iterator[Iterator[Completion]]:
        response = self._open(call)
        try:
            yield events(response)
        finally:
            response.close()

    def classify(self, query: AnyQuery, **options: Unpack[ClassifyOptions]) -> Classification:
        """Rank candidates as answers to a query: `query(...)`, or media alone, such as a path."""
        return self._send(self._api.classify(query, options))

    @overload
    def classify_many(
        self,
        queries: Iterable[AnyQuery],
        *,
        concurrency: int = CONCURRENCY,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[ClassifyOptions],
    ) -> list[Classification]: ...

    @overload
    def classify_many(
        self,
        queries: Iterable[AnyQuery],
        *,
        concurrency: int = CONCURRENCY,
        on_error: Literal["return"],
        **options: Unpack[ClassifyOptions],
    ) -> list[Classification | Exception]: ...

    def classify_many(
        self,
        queries: Iterable[AnyQuery],
        *,
        concurrency: int = CONCURRENCY,
        on_error: OnError = "raise",
        **options: Unpack[ClassifyOptions],
    ) -> Sequence[Classification | Exception]:
        """Classify each query, at most `concurrency` at a time, and return the results in the order of the queries.

        If some queries fail, the others are still classified. Then `QueriesFailed` is raised, whose `results` have an
        error at the position of each failed query; with `on_error="return"` these results are returned. After an error
        that every query would have, such as a wrong API key, no more queries are sent: it is raised if no query has
        succeeded, and otherwise the queries that were not sent have failed with it. An interrupt (Ctrl-C) ends all requests
        of this client, and the results are lost.
        """
        items, options = checked_queries(queries, concurrency, on_error), with_lists(options)
        checked_selection(ClassifyOptions, options)
        outcomes = run_all(
            lambda query: self.classify(query, **options), items, concurrency, self._http.get().end_requests
        )
        return outcomes if on_error == "return" else classifications(outcomes, items)

    def measure(
        self,
        queries: LabelledQueries,
        *,
        methods: Sequence[Method] | None = None,
        concurrency: int = CONCURRENCY,
        **options: Unpack[ClassifyOptions],
    ) -> tuple[Accuracy, ...]:
        """Classify labelled queries by each method, and return how many of the labels are as expected.

        Without `methods`, the method is that of a classification with these options, such as a recommended one. `queries`
        is a folder whose subfolders are named after the labels, or pairs of a query and its label. Queries that are
        examples of the set would be answered too well; leave them out. Raises `ValueError` for a label that no answer can
        have, and what `classify_many` raises; `QueriesFailed` has the `accuracies` of the methods before.
        """
        options = with_lists(options)
        requests = requests_by_method(methods, options)
        items, labels = labelled_queries(queries)
        run(self._send, check_labels(SupportSetCalls(), labels, options))
        with accuracies_kept() as accuracies:
            for method, fields in requests:
                answers = self.classify_many(items, concurrency=concurrency, **fields)
                accuracies.append(Accuracy.of(method, answers, labels))
        return tuple(accuracies)

    def score(
        self, prompt: Prompt, candidates: Sequence[str | Sequence[int]], **options: Unpack[ScoreOptions]
    ) -> tuple[Score, ...]:
        return self._send(self._api.score(prompt, candidates, options))

    def embed(
        self, inputs: str | Sequence[str | Part], **options: Unpack[EmbedOptions]
    ) -> tuple[tuple[float, ...], ...]:
        return self._send(self._api.embed(inputs, options))

    def inspect(self, prompt: Prompt, **options: Unpack[InspectOptions]) -> Json:
        return self._send(self._api.inspect(prompt, options))

    def models(self) -> tuple[Model, ...]:
        return self._send(self._api.models())

    def health(self) -> Health:
        return self._send(self._api.health())

    def close(self) -> None:
        self._http.get().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[Reply]) -> Reply:
        response = self._open(call)
        with transport_errors():
            body = response.read()
        return call.read(response.status_code, body)

    def _download(self, call: Call[Any], path: Path) -> None:
        """Save the body of a reply in a file."""
        with closing(self._open(call)) as response, transport_errors(), written_file(path) as write:
            for piece in response.iter_bytes():
                write(piece)

    def _open(self, call: Call[Any]) -> httpx.Response:
        """Send a call, with retries, and return an accepted response whose body is not yet read."""
        attempts = 1
        while True:
            try:
                return self._send_once(call)
            except FlamboyanceError as error:
                delay = call.delay(self._retries, attempts, error)
                if delay is None:
                    raise
            time.sleep(delay)
            attempts += 1

    def _send_once(self, call: Call[Any]) -> httpx.Response:
        http = self._http.get()
        request = http.build_request(**request_arguments(call, read_file))
        with transport_errors():
            response = http.send(request, stream=True)
            if response.status_code in call.accepts:
                return response
            body = response.read()
        raise status_error(call.path, response.status_code, response.headers, body)


class AsyncClient(MadeAgain):
    """The client for asyncio: `async with AsyncClient() as client: await client.complete(...)`.

    Each event loop that uses it has connections of its own, which `close()` closes, unless `transport` has them.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float | httpx.Timeout = TIMEOUT,
        retries: Retries = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._api = Api(model=model)
        self._retries = retries
        self.fewshot = AsyncFewShot(self._api, self._send, self._stream)
        self.images = AsyncImages(self._send)
        self.support_sets = AsyncSupportSets(self._send, self._download, model)
        self.evaluations = AsyncEvaluations(self._send)
        self.keys = AsyncKeys(self._send)
        settings = client_settings(base_url, api_key, timeout)
        settings |= {"transport": transport, "event_hooks": {"request": [trace_async]}}
        self._http = PerScope(lambda: httpx.AsyncClient(**settings), process_and_loop)

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        return await self._send(self._api.complete(prompt, options))

    def stream(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[AsyncIterator[Completion]]:
        """Stream a completion: `async with client.stream(...) as events: async for event in events: ...`.

        Leaving the block early ends the generation.
        """
        return self._stream(self._api.complete(prompt, options, stream=True))

    @asynccontextmanager
    async def _stream(self, call: Call[Completion]) -> AsyncIterator[AsyncIterator[Completion]]:
        response = await self._open(call)
        try:
            async with aclosing(async_events(response)) as completions:
                yield completions
        finally:
            await response.aclose()

    async def classify(self, query: AnyQuery, **options: Unpack[ClassifyOptions]) -> Classification:
        """Rank candidates as answers to a query: `query(...)`, or media alone, such as a path."""
        return await self._send(await asyncio.to_thread(self._api.classify, query, options))

    @overload
    async def classify_many(
        self,
        queries: Iterable[AnyQuery],
        *,
        concurrency: int = CONCURRENCY,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[ClassifyOptions],
    ) -> list[Classification]: ...

    @overload
    async def classify_many(
        self,
        queries: Iterable[AnyQuery],
        *,
        concurrency: int = CONCURRENCY,
        on_error: Literal["return"],
        **options: Unpack[ClassifyOptions],
    ) -> list[Classification | Exception]: ...

    async def classify_many(
        self,
        queries: Iterable[AnyQuery],
        *,
        concurrency: int = CONCURRENCY,
        on_error: OnError = "raise",
        **options: Unpack[ClassifyOptions],
    ) -> Sequence[Classification | Exception]:
        """Classify each query, at most `concurrency` at a time, and return the results in the order of the queries.

        Failed queries are treated as by `Client.classify_many`.
        """
        items, options = checked_queries(queries, concurrency, on_error), with_lists(options)
        checked_selection(ClassifyOptions, options)
        outcomes = await run_all_async(lambda query: self.classify(query, **options), items, concurrency)
        return outcomes if on_error == "return" else classifications(outcomes, items)

    async def measure(
        self,
        queries: LabelledQueries,
        *,
        methods: Sequence[Method] | None = None,
        concurrency: int = CONCURRENCY,
        **options: Unpack[ClassifyOptions],
    ) -> tuple[Accuracy, ...]:
        """Classify labelled queries by each method, as `Client.measure` does."""
        options = with_lists(options)
        requests = requests_by_method(methods, options)
        items, labels = await asyncio.to_thread(labelled_queries, queries)
        await run_async(self._send, check_labels(SupportSetCalls(), labels, options))
        with accuracies_kept() as accuracies:
            for method, fields in requests:
                answers = await self.classify_many(items, concurrency=concurrency, **fields)
                accuracies.append(Accuracy.of(method, answers, labels))
        return tuple(accuracies)

    async def score(
        self, prompt: Prompt, candidates: Sequence[str | Sequence[int]], **options: Unpack[ScoreOptions]
    ) -> tuple[Score, ...]:
        return await self._send(self._api.score(prompt, candidates, options))

    async def embed(
        self, inputs: str | Sequence[str | Part], **options: Unpack[EmbedOptions]
    ) -> tuple[tuple[float, ...], ...]:
        return await self._send(self._api.embed(inputs, options))

    async def inspect(self, prompt: Prompt, **options: Unpack[InspectOptions]) -> Json:
        return await self._send(self._api.inspect(prompt, options))

    async def models(self) -> tuple[Model, ...]:
        return await self._send(self._api.models())

    async def health(self) -> Health:
        return await self._send(self._api.health())

    async def close(self) -> None:
        await self._http.get().aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: Call[Reply]) -> Reply:
        response = await self._open(call)
        with transport_errors():
            body = await response.aread()
        return call.read(response.status_code, body)

    async def _download(self, call: Call[Any], path: Path) -> None:
        async with aclosing(await self._open(call)) as response:
            with transport_errors(), written_file(path) as write:
                async for piece in response.aiter_bytes():
                    await asyncio.to_thread(write, piece)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        attempts = 1
        while True:
            try:
                return await self._send_once(call)
            except FlamboyanceError as error:
                delay = call.delay(self._retries, attempts, error)
                if delay is None:
                    raise
            await asyncio.sleep(delay)
            attempts += 1

    async def _send_once(self, call: Call[Any]) -> httpx.Response:
        http = self._http.get()
        request = http.build_request(**request_arguments(call, read_file_async))
        with transport_errors():
            response = await http.send(request, stream=True)
            if response.status_code in call.accepts:
                return response
            body = await response.aread()
        raise status_error(call.path, response.status_code, response.headers, body)
