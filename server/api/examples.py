"""Reads the examples of requests: their media become bytes, and each has an id."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from server.fewshot.shots import read_groups
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.schemas.archive import ArchivedExample
from server.schemas.stored import ExampleFields
from server.store.records import NewExample


async def read_examples(examples: Sequence[ExampleFields], intake: Intake) -> list[NewExample]:
    """Read the media of new examples, and give ids to examples without one. Raises what `read_groups` raises."""
    read = await read_groups(examples, "examples", intake)
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
