"""Previews of a support set for notebooks: some of its examples, of all labels, as small pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from flamboyance_client.notebook import MAX_PREVIEWS
from flamboyance_client.records import Preview, StoredExample, SupportSet
from flamboyance_client.steps import Steps
from flamboyance_client.stored import ImageCalls, SupportSetCalls
from flamboyance_client.thumbnails import thumbnail

Item = TypeVar("Item")

# The examples from which the previews are chosen: those of one page.
MAX_EXAMPLES = 1000


def read_previews(calls: SupportSetCalls, images: ImageCalls, name: str, limit: int) -> Steps[SupportSet]:
    """Return a set with previews of up to `limit` examples, whose media are downloaded. Raises `NotFound`."""
    if not 1 <= limit <= MAX_PREVIEWS:
        raise ValueError(f"limit must be 1 to {MAX_PREVIEWS}, not {limit}")
    target = yield calls.get(name, None)
    page = yield calls.examples(target.id, target.version, MAX_EXAMPLES, None)
    previews = []
    for example in spread(page, lambda example: example.label, limit):
        media_id = _image_id(example)
        url = None if media_id is None else thumbnail((yield images.content(media_id)))
        previews.append(Preview(label=example.label or example.text, media=url))
    return replace(target, previews=tuple(previews))


def _image_id(example: StoredExample) -> str | None:
    """Return the id of the first image of an example, or None if it has none."""
    ids = (part.get("image_id") for part in example.raw.get("media") or ())
    return next((media_id for media_id in ids if media_id is not None), None)


def spread(items: Iterable[Item], label: Callable[[Item], str], limit: int) -> list[Item]:
    """Return up to `limit` items, as equally many of each label as possible, ordered by label."""
    by_label: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_label[label(item)].append(item)
    ranked = [(rank, index, item) for index, group in enumerate(by_label.values()) for rank, item in enumerate(group)]
    chosen = sorted(ranked, key=lambda entry: entry[:2])[:limit]
    return [item for _, _, item in sorted(chosen, key=lambda entry: (entry[1], entry[0]))]
