"""What few-shot requests are made of: worked examples, a query, where shots come from, and candidates for an answer.

All are plain dictionaries, as they travel. Media come from a path, from bytes or from a PIL image, or are named by the id
of an upload (`img_…`, `vid_…`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from flamboyance_client.prompt import ImageIdPart, ImagePart, Media, VideoIdPart, VideoPart, to_url

Json = Mapping[str, Any]
MediaPart = ImagePart | VideoPart | ImageIdPart | VideoIdPart
Shown = Media | Sequence[MediaPart]

_IDS = ("img_", "vid_")


class Query(TypedDict, total=False):
    """The unanswered question: what is shown and what is said."""

    image: str
    media: Sequence[MediaPart]
    text: str
    question: str


class Shot(Query, total=False):
    """A worked example."""

    id: str
    answer: str
    label: str


class Example(Shot, total=False):
    """A shot to keep in a support set."""

    metadata: Json


class Selection(TypedDict, total=False):
    """Shots out of a support set; without a version, its last."""

    support_set: str
    version: int | None
    k: int | None
    strategy: Literal["first", "random", "balanced", "rices_image", "rices_text", "mixed"]
    order: Literal["as_selected", "similar_last", "stored", "shuffled"] | None
    seed: int


class Template(TypedDict, total=False):
    """A template of your own, with the places {media} {text} {question} {answer} {label}."""

    shot: str
    query: str
    separator: str
    end: str


class Candidate(TypedDict):
    """A label, and the text that the model would write for it."""

    label: str
    text: str


def query(media: Shown | None = None, *, text: str | None = None, question: str | None = None) -> Query:
    """The last media and what is said about them, to be answered."""
    made: Query = {}
    if media is not None:
        _show(made, media)
    if text is not None:
        made["text"] = text
    if question is not None:
        made["question"] = question
    return made


def example(
    media: Shown | None = None,
    answer: str | None = None,
    *,
    label: str | None = None,
    question: str | None = None,
    id: str | None = None,
    metadata: Json | None = None,
) -> Example:
    """A worked example, for a request's `shots` or for a support set, which alone keeps `metadata`."""
    made: Example = {}
    if media is not None:
        _show(made, media)
    given = {"answer": answer, "label": label, "question": question, "id": id, "metadata": metadata}
    made.update({name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    return made


def _show(made: Query, media: Shown) -> None:
    if isinstance(media, str) and media.startswith(_IDS):
        made["image"] = media
    elif isinstance(media, Sequence) and not isinstance(media, str | bytes):
        made["media"] = list(media)
    else:
        made["image"] = to_url(media)
