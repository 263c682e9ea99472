"""The fields of few-shot requests: worked examples, a query, the selection of shots, and candidates for an answer.

All are plain dictionaries, in the form in which they are sent. Media are a path, bytes, a PIL image, an array of pixels, or
the id of an upload (`img_…`, `vid_…`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from flamboyance_client.prompt import BUFFERS, ImageIdPart, ImagePart, Media, VideoIdPart, VideoPart, to_url

Json = Mapping[str, Any]
MediaPart = ImagePart | VideoPart | ImageIdPart | VideoIdPart
QueryMedia = Media | Sequence[MediaPart]

# The name of a file, such as `img_1.jpg`, is no id.
_ID = re.compile(r"(img|vid)_[0-9a-f]+")


class Query(TypedDict, total=False):
    """A query without an answer: its media, its text and its question."""

    image: Media
    media: Sequence[MediaPart]
    text: str
    question: str


AnyQuery = Query | QueryMedia


class Shot(Query, total=False):
    """A worked example: a query with its answer or label."""

    id: str
    answer: str
    label: str


class Example(Shot, total=False):
    """A shot to store in a support set."""

    metadata: Json


class Selection(TypedDict, total=False):
    """A selection of shots from a support set; without a version, from its latest."""

    support_set: str
    version: int | None
    k: int | None
    strategy: Literal["first", "random", "balanced", "rices_image", "rices_text", "mixed"]
    order: Literal["as_selected", "similar_last", "stored", "shuffled"] | None
    seed: int


Fields = TypeVar("Fields", Query, Shot, Example)


class Template(TypedDict, total=False):
    """A custom template, with the placeholders {media} {text} {question} {answer} {label}."""

    shot: str
    query: str
    separator: str
    end: str


class Candidate(TypedDict):
    """A label and the text that the model would generate for it."""

    label: str
    text: str


def query(media: QueryMedia | None = None, *, text: str | None = None, question: str | None = None) -> Query:
    """Return a query: the media at the end of the prompt, with their text and question."""
    fields: Query = {}
    if media is not None:
        _set_media(fields, media)
    if text is not None:
        fields["text"] = text
    if question is not None:
        fields["question"] = question
    return fields


def example(
    media: QueryMedia | None = None,
    answer: str | None = None,
    *,
    label: str | None = None,
    question: str | None = None,
    id: str | None = None,
    metadata: Json | None = None,
) -> Example:
    """Return a worked example for the `shots` of a request or for a support set. Only a support set stores `metadata`."""
    fields: Example = {}
    if media is not None:
        _set_media(fields, media)
    optional = {"answer": answer, "label": label, "question": question, "id": id, "metadata": metadata}
    fields.update({name: value for name, value in optional.items() if value is not None})  # type: ignore[typeddict-item]
    return fields


def as_query(value: AnyQuery) -> Query:
    """Return a query as it is sent, and media as a query without text."""
    if isinstance(value, Mapping):
        return with_media(value)
    fields: Query = {}
    _set_media(fields, value)
    return fields


def with_media(fields: Fields) -> Fields:
    """Return a query, a shot or an example with its image as it is sent. Raises what reading the image raises."""
    if "image" not in fields:
        return fields
    sent = fields.copy()
    _set_media(sent, sent.pop("image"))
    return sent


def is_stored(media: str) -> bool:
    """Return whether a text is the id of an upload."""
    return _ID.fullmatch(media) is not None


def _checked_parts(media: Sequence[MediaPart]) -> list[MediaPart]:
    for part in media:
        if not isinstance(part, Mapping) or "type" not in part:
            raise TypeError(
                f"the media of a query must be parts, such as image(...), not {type(part).__name__}; "
                "classify_many(...) classifies several queries"
            )
    return list(media)


def _set_media(fields: Query, media: QueryMedia) -> None:
    if isinstance(media, str) and is_stored(media):
        fields["image"] = media
    elif isinstance(media, Sequence) and not isinstance(media, (str, *BUFFERS)):
        fields["media"] = _checked_parts(media)
    elif (url := to_url(media)).startswith("data:video/"):
        fields["media"] = [{"type": "video_url", "video_url": {"url": url}}]
    else:
        fields["image"] = url
