"""The resources of an async client, `fewshot`, `images`, `support_sets` and `evaluations`, with one method per call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, Unpack

from flamboyance_client.api import Api, Call
from flamboyance_client.curation import Diagnostics, Suggestions
from flamboyance_client.errors import Conflict, TransportError
from flamboyance_client.evaluations import Evaluation
from flamboyance_client.fewshot import AnyQuery, Example, QueryMedia
from flamboyance_client.frames import Columns, Frame
from flamboyance_client.notebook import MAX_PREVIEWS
from flamboyance_client.options import (
    EvaluateOptions,
    FewShotOptions,
    NewSet,
    SearchOptions,
    SetChanges,
    SetFields,
    SuggestOptions,
    WarmOptions,
)
from flamboyance_client.previews import read_previews
from flamboyance_client.progress import LOST_SECONDS, POLL_SECONDS, completed, continued, progress_bar
from flamboyance_client.prompt import Media
from flamboyance_client.records import Page, StoredExample, StoredMedia, SupportSet
from flamboyance_client.replies import Completion
from flamboyance_client.steps import run_async
from flamboyance_client.stored import NAME_TAKEN, PAGE, EvaluationCalls, ImageCalls, SupportSetCalls
from flamboyance_client.transfers import archive_path, archived_name
from flamboyance_client.uploads import upload_folder, upload_frame

Reply = TypeVar("Reply")


class Send(Protocol):
    async def __call__(self, call: Call[Reply]) -> Reply: ...


Download = Callable[[Call[Any], Path], Awaitable[None]]
Stream = Callable[[Call[Completion]], AbstractAsyncContextManager[AsyncIterator[Completion]]]


class AsyncFewShot:
    """Answers to queries after worked examples, passed as `shots` or selected from a support set with `examples`."""

    def __init__(self, api: Api, send: Send, stream: Stream) -> None:
        self._api, self._send, self._stream = api, send, stream

    async def complete(self, query: AnyQuery, **options: Unpack[FewShotOptions]) -> Completion:
        return await self._send(await asyncio.to_thread(self._api.fewshot, query, options))

    @asynccontextmanager
    async def stream(
        self, query: AnyQuery, **options: Unpack[FewShotOptions]
    ) -> AsyncIterator[AsyncIterator[Completion]]:
        call = await asyncio.to_thread(self._api.fewshot, query, options, stream=True)
        async with self._stream(call) as events:
            yield events


class AsyncImages:
    """Images and videos that are uploaded once and then referred to by id."""

    def __init__(self, send: Send) -> None:
        self._calls, self._send = ImageCalls(), send

    async def upload(self, media: Media) -> StoredMedia:
        return await self._send(await asyncio.to_thread(self._calls.upload, media))

    async def get(self, media_id: str) -> StoredMedia:
        return await self._send(self._calls.get(media_id))

    async def content(self, media_id: str) -> bytes:
        return await self._send(self._calls.content(media_id))

    async def list(self, *, limit: int = PAGE, after: str | None = None) -> Page[StoredMedia]:
        return await self._send(self._calls.list(limit, after))

    async def delete(self, media_id: str) -> bool:
        return await self._send(self._calls.delete(media_id))


class AsyncSupportSets:
    """Named, versioned lists of worked examples. `name` is the name or the id of a set."""

    def __init__(self, send: Send, download: Download, model: str | None) -> None:
        self._calls, self._send, self._download = SupportSetCalls(model=model), send, download
        self._evaluations = AsyncEvaluations(send)

    async def create(self, *, exist_ok: bool = False, **fields: Unpack[NewSet]) -> SupportSet:
        """Create a set. With `exist_ok`, a set that has the name already is returned as it is."""
        try:
            return await self._send(await asyncio.to_thread(self._calls.create, fields))
        except Conflict as conflict:
            name = fields.get("name")
            if not exist_ok or conflict.code != NAME_TAKEN or name is None:
                raise
            return await self.get(name)

    async def from_folder(
        self,
        folder: str | Path,
        *,
        question: str | None = None,
        name: str | None = None,
        skip_unreadable: bool = False,
        exist_ok: bool = True,
        **fields: Unpack[SetFields],
    ) -> SupportSet:
        """Return a set of the images and videos in the subfolders of a folder, whose names are the labels.

        `question` is the question of each example, which templates such as `vqa` need; the label is its answer. The set
        has the folder's name, unless `name` is given. A set that exists is returned as it is if it has the examples of
        the folder; otherwise it gets new versions. New files are added, and labels that were changed are those of the
        folder again. Examples that an earlier upload wrote and whose files are gone are removed, and counted in
        `num_removed`; other examples stay. `fields` are set in both cases. Raises `ValueError` for a file that the server
        cannot read or that has no label, `BadRequest` for one that it refuses, such as a damaged one, and `Conflict` for a
        set that exists unless `exist_ok`. With `skip_unreadable`, such files are left out and listed in `skipped`, and
        examples that they had before stay; new files are sent twice.
        """
        steps = upload_folder(
            self._calls, folder, question, name, skip_unreadable=skip_unreadable, exist_ok=exist_ok, fields=fields
        )
        return await run_async(self._send, steps)

    async def from_dataframe(
        self,
        frame: Frame,
        *,
        image: str = "image",
        label: str | None = "label",
        answer: str | None = None,
        question: str | None = None,
        root: str | Path = "",
        name: str | None = None,
        exist_ok: bool = True,
        **fields: Unpack[SetFields],
    ) -> SupportSet:
        """Return a set of the rows of a data frame of pandas or polars. A set that exists is treated as by `from_folder`.

        `image`, `label`, `answer` and `question` are the names of columns. Images are paths, which are relative to `root`,
        URLs, bytes, PIL images, arrays of pixels or ids of uploads. A label is a text or a whole number. Without a name,
        each call creates a set. Raises `ValueError` for a missing column or value.
        """
        columns = Columns(image=image, label=label, answer=answer, question=question)
        steps = upload_frame(self._calls, frame, columns, root, name, exist_ok=exist_ok, fields=fields)
        return await run_async(self._send, steps)

    async def get(self, name: str, *, version: int | None = None) -> SupportSet:
        return await self._send(self._calls.get(name, version))

    async def preview(self, name: str, *, limit: int = MAX_PREVIEWS) -> SupportSet:
        """Return a set with small pictures of up to `limit` examples, which are downloaded, for a notebook to show."""
        return await run_async(self._send, read_previews(self._calls, ImageCalls(), name, limit))

    async def list(self, *, limit: int = PAGE, after: str | None = None) -> Page[SupportSet]:
        return await self._send(self._calls.list(limit, after))

    async def update(self, name: str, /, **changes: Unpack[SetChanges]) -> SupportSet:
        """Update fields of a set. `None` removes a value."""
        return await self._send(self._calls.update(name, changes))

    async def delete(self, name: str) -> bool:
        return await self._send(self._calls.delete(name))

    async def put(self, name: str, examples: Sequence[Example], *, expected_version: int | None = None) -> SupportSet:
        """Add examples, and replace those whose ids exist."""
        return await self._send(await asyncio.to_thread(self._calls.put, name, examples, expected_version))

    async def remove(self, name: str, ids: str | Sequence[str], *, expected_version: int | None = None) -> SupportSet:
        """Remove examples by their ids. A text is one id."""
        return await self._send(self._calls.remove(name, ids, expected_version))

    async def examples(
        self, name: str, *, version: int | None = None, limit: int = PAGE, after: str | None = None
    ) -> Page[StoredExample]:
        return await self._send(self._calls.examples(name, version, limit, after))

    async def export(self, name: str, path: str | Path, *, version: int | None = None) -> Path:
        """Save a version of a set with its media as one file, and return its path. In a folder it has the set's name.

        A file that exists is replaced when the new one is complete. A pipe or a device is written to.
        """
        call = self._calls.export(name, version)
        file = archive_path(path, name)
        await self._download(call, file)
        return file

    async def import_(self, path: str | Path, *, name: str | None = None, exist_ok: bool = False) -> SupportSet:
        """Create a set from an exported file, with the name in the file unless `name` is given.

        With `exist_ok`, a set that has the name already is returned as it is.
        """
        try:
            return await self._send(await asyncio.to_thread(self._calls.import_, Path(path), name))
        except Conflict as conflict:
            name = name or await asyncio.to_thread(archived_name, Path(path))
            if not exist_ok or conflict.code != NAME_TAKEN or name is None:
                raise
            return await self.get(name)

    async def search(self, name: str, query: AnyQuery, **options: Unpack[SearchOptions]) -> Page[StoredExample]:
        return await self._send(await asyncio.to_thread(self._calls.search, name, query, options))

    async def diagnostics(self, name: str, *, version: int | None = None, limit: int | None = None) -> Diagnostics:
        """Return the examples that look mislabelled, harm the others, repeat, or contradict each other."""
        return await self._send(self._calls.diagnostics(name, version, limit))

    async def suggest(self, name: str, pool: Sequence[QueryMedia], **options: Unpack[SuggestOptions]) -> Suggestions:
        """Return which media of a pool to label next, in this order."""
        return await self._send(await asyncio.to_thread(self._calls.suggest, name, pool, options))

    async def warm(self, name: str, **options: Unpack[WarmOptions]) -> SupportSet:
        return await self._send(self._calls.warm(name, options))

    async def evaluate(self, name: str, *, wait: bool = False, **options: Unpack[EvaluateOptions]) -> Evaluation:
        """Start a leave-one-out evaluation. With `wait`, return it when it is over, with a progress bar on a terminal.

        Without, `evaluations.get` returns its progress, and `evaluations.wait` waits for it. Raises `EvaluationFailed` if
        it is waited for and fails.
        """
        evaluation = await self._send(self._calls.evaluate(name, options))
        return await self._evaluations.wait(evaluation.id) if wait else evaluation


class AsyncEvaluations:
    """Leave-one-out evaluations of support sets."""

    def __init__(self, send: Send) -> None:
        self._calls, self._send = EvaluationCalls(), send

    async def get(self, evaluation_id: str) -> Evaluation:
        return await self._send(self._calls.get(evaluation_id))

    async def list(
        self, *, support_set: str | None = None, limit: int = PAGE, after: str | None = None
    ) -> Page[Evaluation]:
        return await self._send(self._calls.list(support_set, limit, after))

    async def wait(self, evaluation_id: str) -> Evaluation:
        """Return an evaluation when it is over, with a progress bar on a terminal.

        Raises `EvaluationFailed` for one that failed or was cancelled, and `NotFound`. Other errors have a note with its
        id: the evaluation continues on the server.
        """
        evaluation = await self._poll(evaluation_id)
        with progress_bar(evaluation) as show:
            while not evaluation.is_over:
                await asyncio.sleep(POLL_SECONDS)
                evaluation = await self._poll(evaluation_id)
                show(evaluation)
        return completed(evaluation)

    async def _poll(self, evaluation_id: str) -> Evaluation:
        """Return an evaluation. A lost connection is made again a few times."""
        with continued(evaluation_id):
            for seconds in LOST_SECONDS:
                try:
                    return await self.get(evaluation_id)
                except TransportError:
                    await asyncio.sleep(seconds)
            return await self.get(evaluation_id)

    async def cancel(self, evaluation_id: str) -> Evaluation:
        return await self._send(self._calls.cancel(evaluation_id))

    async def delete(self, evaluation_id: str) -> bool:
        return await self._send(self._calls.delete(evaluation_id))
