"""The calls of stored resources (uploads, support sets and evaluations), built as data, as in `api`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

from flamboyance_client.api import Call, checked_options, json_reader
from flamboyance_client.curation import Diagnostics, Suggestions, checked_pool
from flamboyance_client.evaluations import Evaluation
from flamboyance_client.fewshot import AnyQuery, Example, QueryMedia, as_query, with_media
from flamboyance_client.options import EvaluateOptions, NewSet, SearchOptions, SetChanges, SuggestOptions, WarmOptions
from flamboyance_client.prompt import Media, checked_list, encode_media, is_url
from flamboyance_client.records import Page, StoredExample, StoredMedia, SupportSet, is_deleted
from flamboyance_client.steps import Steps
from flamboyance_client.transfers import ARCHIVE_TYPE, size_of

PAGE = 100
# of the pages of a whole set
LISTED_AT_ONCE = 1000
# the options of an evaluation of which a single value stands for a list
LISTS = frozenset({"k", "strategies", "methods", "controls", "seeds"})
EXAMPLES = "examples must be a list, such as [example(...)]"
# the code of the error for a name that another support set has
NAME_TAKEN = "name_taken"

Item = TypeVar("Item")


class ImageCalls:
    """Builds the calls of `/v1/images`."""

    def upload(self, media: Media) -> Call[StoredMedia]:
        """Upload media as bytes. A URL is passed to the server, which fetches it if its settings permit."""
        read = json_reader(StoredMedia.parse)
        if is_url(media):
            return Call(method="POST", path="/v1/images", body={"url": media}, read=read)
        data, content_type = encode_media(media)
        return Call(method="POST", path="/v1/images", content=data, content_type=content_type, read=read)

    def get(self, media_id: str) -> Call[StoredMedia]:
        return Call(method="GET", path=resource_path("images", media_id), read=json_reader(StoredMedia.parse))

    def content(self, media_id: str) -> Call[bytes]:
        return Call(method="GET", path=f"{resource_path('images', media_id)}/content", read=lambda status, body: body)

    def list(self, limit: int, after: str | None) -> Call[Page[StoredMedia]]:
        read = json_reader(lambda values: Page[StoredMedia].parse(values, StoredMedia.parse))
        return Call(method="GET", path="/v1/images", query=_query(limit=limit, after=after), read=read)

    def delete(self, media_id: str) -> Call[bool]:
        return Call(method="DELETE", path=resource_path("images", media_id), read=json_reader(is_deleted))


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSetCalls:
    """Builds the calls of `/v1/support_sets`. `model` is sent with the calls that run a model."""

    model: str | None = None

    def create(self, fields: NewSet) -> Call[SupportSet]:
        sent = checked_options(NewSet, fields)
        if "examples" in sent:
            sent["examples"] = list(map(with_media, checked_list(sent["examples"], EXAMPLES)))
        return _created("/v1/support_sets", sent)

    def get(self, name: str, version: int | None) -> Call[SupportSet]:
        path, query = resource_path("support_sets", name), _query(version=version)
        return Call(method="GET", path=path, query=query, read=json_reader(SupportSet.parse))

    def list(self, limit: int, after: str | None) -> Call[Page[SupportSet]]:
        read = json_reader(lambda values: Page[SupportSet].parse(values, SupportSet.parse))
        return Call(method="GET", path="/v1/support_sets", query=_query(limit=limit, after=after), read=read)

    def update(self, name: str, changes: SetChanges) -> Call[SupportSet]:
        checked_options(SetChanges, changes)
        return _set_call("PATCH", resource_path("support_sets", name), dict(changes))

    def delete(self, name: str) -> Call[bool]:
        return Call(method="DELETE", path=resource_path("support_sets", name), read=json_reader(is_deleted))

    def put(self, name: str, examples: Sequence[Example], expected_version: int | None) -> Call[SupportSet]:
        expected = {} if expected_version is None else {"expected_version": expected_version}
        return _created(
            resource_path("support_sets", name, "examples"),
            {"examples": list(map(with_media, checked_list(examples, EXAMPLES))), **expected},
        )

    def remove(self, name: str, ids: str | Sequence[str], expected_version: int | None) -> Call[SupportSet]:
        query = _query(id=_joined(ids), expected_version=expected_version)
        path = resource_path("support_sets", name, "examples")
        return Call(method="DELETE", path=path, query=query, read=json_reader(SupportSet.parse))

    def examples(self, name: str, version: int | None, limit: int, after: str | None) -> Call[Page[StoredExample]]:
        query = _query(version=version, limit=limit, after=after)
        read = json_reader(lambda values: Page[StoredExample].parse(values, StoredExample.parse))
        return Call(method="GET", path=resource_path("support_sets", name, "examples"), query=query, read=read)

    def export(self, name: str, version: int | None) -> Call[bytes]:
        path = resource_path("support_sets", name, "export")
        return Call(method="GET", path=path, query=_query(version=version), read=lambda status, body: body)

    def import_(self, file: Path, name: str | None) -> Call[SupportSet]:
        return Call(
            method="POST",
            path=resource_path("support_sets", "import"),
            file=file,
            content_type=ARCHIVE_TYPE,
            query=_query(name=name),
            read=json_reader(SupportSet.parse),
            is_retryable=size_of(file) is not None,  # a pipe is read once
            idempotency_key=str(uuid4()),
        )

    def search(self, name: str, query: AnyQuery, options: SearchOptions) -> Call[Page[StoredExample]]:
        body = self._with_model({**checked_options(SearchOptions, options), "query": as_query(query)})
        read = json_reader(lambda values: Page[StoredExample].parse(values, StoredExample.parse))
        return Call(method="POST", path=resource_path("support_sets", name, "search"), body=body, read=read)

    def diagnostics(self, name: str, version: int | None, limit: int | None) -> Call[Diagnostics]:
        path, query = resource_path("support_sets", name, "diagnostics"), _query(version=version, limit=limit)
        return Call(method="GET", path=path, query=query, read=json_reader(Diagnostics.parse))

    def suggest(self, name: str, pool: Sequence[QueryMedia], options: SuggestOptions) -> Call[Suggestions]:
        media = checked_pool(pool)
        fields = {**checked_options(SuggestOptions, options), "pool": list(map(as_query, media))}
        read = json_reader(lambda values: Suggestions.parse(values, media))
        path = resource_path("support_sets", name, "suggest")
        return Call(method="POST", path=path, body=self._with_model(fields), read=read)

    def warm(self, name: str, options: WarmOptions) -> Call[SupportSet]:
        return _set_call("POST", resource_path("support_sets", name, "warm"), checked_options(WarmOptions, options))

    def evaluate(self, name: str, options: EvaluateOptions) -> Call[Evaluation]:
        fields = checked_options(EvaluateOptions, options)
        lists = {key: [fields[key]] for key in LISTS & fields.keys() if isinstance(fields[key], Integral | str)}
        return Call(
            method="POST",
            path=resource_path("support_sets", name, "evaluate"),
            body=self._with_model({**fields, **lists}),
            read=json_reader(Evaluation.parse),
            accepts=frozenset({202}),
            can_run_twice=False,
        )

    def _with_model(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self.model is None else {"model": self.model, **body}


class EvaluationCalls:
    """Builds the calls of `/v1/evaluations`."""

    def get(self, evaluation_id: str) -> Call[Evaluation]:
        return Call(method="GET", path=resource_path("evaluations", evaluation_id), read=json_reader(Evaluation.parse))

    def list(self, support_set: str | None, limit: int, after: str | None) -> Call[Page[Evaluation]]:
        query = _query(support_set=support_set, limit=limit, after=after)
        read = json_reader(lambda values: Page[Evaluation].parse(values, Evaluation.parse))
        return Call(method="GET", path="/v1/evaluations", query=query, read=read)

    def cancel(self, evaluation_id: str) -> Call[Evaluation]:
        path = resource_path("evaluations", evaluation_id, "cancel")
        return Call(method="POST", path=path, read=json_reader(Evaluation.parse))

    def delete(self, evaluation_id: str) -> Call[bool]:
        return Call(method="DELETE", path=resource_path("evaluations", evaluation_id), read=json_reader(is_deleted))


def read_examples(
    calls: SupportSetCalls, support_set: SupportSet, read: Callable[[StoredExample], Item]
) -> Steps[list[Item]]:
    """Return what `read` returns for each example of a version, in order."""
    items: list[Item] = []
    after: str | None = None
    while True:
        page = yield calls.examples(support_set.id, support_set.version, LISTED_AT_ONCE, after)
        items += map(read, page)
        if not page.has_more:
            return items
        after = page.last_id


def _set_call(method: str, path: str, body: dict[str, Any]) -> Call[SupportSet]:
    return Call(method=method, path=path, body=body, read=json_reader(SupportSet.parse))


def _created(path: str, body: dict[str, Any]) -> Call[SupportSet]:
    """Return a call that creates a version; its key lets the server recognise it when it is sent again."""
    return replace(_set_call("POST", path, body), idempotency_key=str(uuid4()))


def resource_path(*segments: str) -> str:
    """Return the path of a resource.

    Raises `ValueError` for a name or an id that would change the rest of the path, and `TypeError` for another object.
    """
    for segment in segments:
        if not isinstance(segment, str):
            raise TypeError(f"expected a name or an id, such as support_set.id, not a {type(segment).__name__}")
        if segment in ("", ".", "..") or not segment.isprintable():
            raise ValueError(f"{segment!r} is not a name or id")
    return "/v1/" + "/".join(quote(segment, safe="") for segment in segments)


def _joined(ids: str | Sequence[str]) -> str:
    """Return the ids of examples as they are sent; a text is one id. Raises `ValueError` for a list in a text."""
    several = [ids] if isinstance(ids, str) else list(ids)
    if wrong := [example_id for example_id in several if "," in example_id]:
        raise ValueError(f"{wrong[0]!r} is not the id of an example; several ids are a list")
    return ",".join(several)


def _query(**values: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in values.items() if value is not None}
