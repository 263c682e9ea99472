"""Reads the examples of requests: their media become bytes, and each has an id."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from server.errors import InvalidMedia, ServerError
from server.fewshot.shots import AFTER_SHORT_FORM
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.schemas.archive import ArchivedExample
from server.schemas.stored import ExampleFields
from server.store.records import NewExample

# examples whose media are read at once
MAX_CONCURRENT = 32


async def read_examples(examples: Sequence[ExampleFields], intake: Intake) -> list[NewExample]:
    """Read the media of new examples, and give ids to examples without one.

    Raises what the intake raises, naming the example at fault, and `InvalidMedia` for more bytes than a request may have.
    """
    read: list[list[EncodedMedia]] = []
    num_bytes, limit = 0, intake.settings.max_body_bytes
    for start in range(0, len(examples), MAX_CONCURRENT):
        batch = enumerate(examples[start : start + MAX_CONCURRENT], start)
        media = await asyncio.gather(*(_media(example, f"examples[{index}]", intake) for index, example in batch))
        num_bytes += sum(item.num_bytes for items in media for item in items if item.is_in_memory)
        if num_bytes > limit:
            raise InvalidMedia(f"{num_bytes} bytes of media in one request, the limit is {limit}", param="examples")
        read += media
    return await asyncio.to_thread(new_examples, examples, read)


def new_examples(
    examples: Sequence[ExampleFields | ArchivedExample], media: Sequence[Sequence[EncodedMedia]]
) -> list[NewExample]:
    """Return examples as they are stored, each with its media; those without an id get one. For thousands it blocks."""
    return [
        NewExample(
            id=f"ex_{uuid.uuid4().hex}" if example.id is None else example.id,
            media=tuple(items),
            **example.model_dump(include={"text", "label", "question", "metadata"}),
        )
        for example, items in zip(examples, media, strict=True)
    ]


async def _media(example: ExampleFields, param: str, intake: Intake) -> list[EncodedMedia]:
    try:
        media = [await intake.read(part, path) for path, part in example.parts(param).items()]
    except ServerError as error:
        error.param = AFTER_SHORT_FORM.sub("", error.param or param)
        raise
    for item in media:
        item.param = AFTER_SHORT_FORM.sub("", item.param)
    return media
