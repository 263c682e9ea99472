"""The examples of a request as they will be stored: their media read, and an id given to those that have none."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from server.errors import InvalidMedia, ServerError
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.schemas.support_sets import ExampleFields
from server.store.records import NewExample

# read side by side
PORTION = 32


async def read_examples(examples: Sequence[ExampleFields], intake: Intake) -> list[NewExample]:
    """Raises what the intake raises, naming the example at fault; `InvalidMedia` for more bytes than one request may
    bring, wherever they come from."""
    read: list[list[EncodedMedia]] = []
    num_bytes, limit = 0, intake.settings.max_body_bytes
    for start in range(0, len(examples), PORTION):
        some = enumerate(examples[start : start + PORTION], start)
        found = await asyncio.gather(*(_media(example, f"examples[{place}]", intake) for place, example in some))
        num_bytes += sum(len(one.data) for media in found for one in media if one.is_at_hand)
        if num_bytes > limit:
            raise InvalidMedia(f"{num_bytes} bytes of media in one request, the limit is {limit}", param="examples")
        read += found
    return [_new(example, media) for example, media in zip(examples, read, strict=True)]


def _new(example: ExampleFields, media: Sequence[EncodedMedia]) -> NewExample:
    return NewExample(
        id=f"ex_{uuid.uuid4().hex}" if example.id is None else example.id,
        media=tuple(media),
        text=example.text,
        label=example.label,
        question=example.question,
        metadata=example.metadata,
    )


async def _media(example: ExampleFields, param: str, intake: Intake) -> list[EncodedMedia]:
    if example.image is None:
        return [await intake.read(part, f"{param}.media[{i}]") for i, part in enumerate(example.parts())]
    # the client knows the short form by its own name
    param = f"{param}.image"
    try:
        (found,) = [await intake.read(part, param) for part in example.parts()]
    except ServerError as error:
        error.param = param
        raise
    found.param = param
    return [found]
