"""Support-set writers that may be killed at any moment: `python -m tests.server.store.killable_writers URL FOLDER`.

Each line of input, `alone SEED` or `shared SEED COUNT`, forks a writer and is answered with its process id. A writer
prints each acknowledgement at once, one JSON object per line; `{"ended": PID}` follows the end of one that writes alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from typing import Any

from server.media.source import EncodedMedia, encoded
from server.media.store import MediaStore
from server.store import staging
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.records import NewExample, SupportSetInfo
from server.store.support_sets import SupportSets

SHARED = "shared"
IDS = [f"e{number}" for number in range(8)]


def emit(**line: Any) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")  # a single write: complete or absent


def media(rng: random.Random) -> EncodedMedia:
    return encoded(rng.randbytes(rng.randrange(1, 40_000)), "image", "")


def new_example(rng: random.Random, example_id: str) -> NewExample:
    return NewExample(
        id=example_id, media=tuple(media(rng) for _ in range(rng.randrange(3))), text=str(rng.random()), label="x"
    )


def as_json(example: NewExample) -> list[Any]:
    return [example.id, example.text, [item.id for item in example.media]]


async def write_alone(support_sets: SupportSets, seed: int) -> None:
    """Change a set endlessly, and acknowledge each version with all of its examples."""
    rng, name = random.Random(seed), f"s{seed}"
    examples = {e.id: e for e in (new_example(rng, i) for i in rng.sample(IDS, 3))}
    info = await support_sets.create(name, list(examples.values()))
    while True:
        emit(set=name, version=info.version, examples=sorted(map(as_json, examples.values())))
        if len(examples) > 1 and rng.random() < 0.3:
            removed = rng.choice(list(examples))
            del examples[removed]
            info = await support_sets.remove_examples(name, [removed])
        else:
            new = [new_example(rng, i) for i in rng.sample(IDS, rng.randrange(1, 4))]
            examples |= {example.id: example for example in new}
            info = await support_sets.put_examples(name, new)


async def write_shared(support_sets: SupportSets, seed: int, count: int) -> None:
    """Put `count` examples into a set that other writers change too."""
    rng = random.Random(seed)
    for number in range(count):
        example = new_example(rng, f"w{seed}-{number}")
        info: SupportSetInfo = await support_sets.put_examples(SHARED, [example])
        emit(set=SHARED, version=info.version, example=as_json(example))


def main(url: str, folder: str) -> None:
    staging.EXAMPLES_PER_TRANSACTION = 1  # a writer that is killed may leave a part of a request
    for line in sys.stdin:
        kind, *numbers = line.split()
        if pid := os.fork():
            emit(started=pid)
            if kind == "alone":
                os.waitpid(pid, 0)
                emit(ended=pid)
            continue
        database = Database(url)
        support_sets = SupportSets(database, MediaReferences(database, MediaStore(folder)))
        writer = write_alone if kind == "alone" else write_shared
        asyncio.run(writer(support_sets, *map(int, numbers)))
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
