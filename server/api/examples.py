"""Reads the examples of requests, of which there may be thousands: fetches their media, and gives each an id."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from server.concurrency import run_concurrently
from server.fewshot.shots import MediaOwner
from server.media.intake import Intake
from server.media.source import EncodedMedia, too_large_together
from server.schemas.archive import ArchivedExample
from server.schemas.stored import ExampleFields
from server.store.records import NewExample

# number of owners whose media are read concurrently
MAX_CONCURRENT = 32


async def read_examples(examples: Sequence[ExampleFields], intake: Intake) -> list[NewExample]:
    """Read the media of new examples, and give ids to examples without one. Raises what `read_groups` raises."""
    read = await read_groups(examples, "examples", intake)
    return await asyncio.to_thread(new_examples, examples, read)


def new_examples(
    examples: Sequence[ExampleFields | ArchivedExample], media: Sequence[Sequence[EncodedMedia]]
) -> list[NewExample]:
    """Return examples as they are stored, each with its media and an id. It blocks for long if there are thousands."""
    return [
        NewExample(
            id=f"ex_{uuid.uuid4().hex}" if example.id is None else example.id,
            media=tuple(items),
            **example.model_dump(include={"text", "label", "question", "metadata"}),
        )
        for example, items in zip(examples, media, strict=True)
    ]


async def read_groups(owners: Sequence[MediaOwner], param: str, intake: Intake) -> list[list[EncodedMedia]]:
    """Return the media of each owner, of which there may be more than a prompt may show.

    Raises what the intake raises, with the owner's position in the list `param`, and `InvalidMedia` for more bytes than a
    request may have.
    """
    read: list[list[EncodedMedia]] = []
    num_bytes, limit = 0, intake.settings.max_body_bytes
    for start in range(0, len(owners), MAX_CONCURRENT):
        batch = enumerate(owners[start : start + MAX_CONCURRENT], start)
        media = await run_concurrently([_read_owner(owner, f"{param}[{index}]", intake) for index, owner in batch])
        num_bytes += sum(item.num_bytes for items in media for item in items if item.is_in_memory)
        if num_bytes > limit:
            raise too_large_together(num_bytes, limit, param)
        read += media
    return read


async def _read_owner(owner: MediaOwner, param: str, intake: Intake) -> list[EncodedMedia]:
    return [await intake.read(part, path) for path, part in owner.parts(param).items()]
