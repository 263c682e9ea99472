"""Labelled media: examples of a support set before they are uploaded, with ids that depend on their content alone.

The same content has the same id in every run, so a set is compared with its source by ids.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from flamboyance_client.bodies import check_values
from flamboyance_client.fewshot import Example, example, is_stored
from flamboyance_client.prompt import Media, encode_media, is_url

# An id has at most 128 characters.
MAX_FILE = 80
DIGEST_BYTES = 8
# the form of these ids, which tells them from the ids of other examples: the colon and the digest
CONTENT_ID = re.compile(rf"[A-Za-z0-9_.-]*:[0-9a-f]{{{2 * DIGEST_BYTES}}}(\.[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledMedia:
    """An image or video with its label.

    `name` identifies it in messages. `file` is its path relative to the source, and part of its id.
    """

    name: str
    media: Media
    file: str = ""
    label: str | None = None
    answer: str | None = None
    question: str | None = None
    id: str | None = None

    @property
    def texts(self) -> tuple[str, str, str]:
        """The label, answer and question of the stored example."""
        return self.label or "", self.answer or "", self.question or ""

    @property
    def file_in_id(self) -> str:
        """The part of its id that names the file: the path in characters that an id may have."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", without_accents(self.file))[-MAX_FILE:]

    def example(self) -> Example:
        """Return the example with the content of its media. Raises what reading the media raises."""
        return example(self.media, id=self.id, label=self.label, answer=self.answer, question=self.question)


# media that the server cannot read, and the reason
Unreadable = tuple[LabelledMedia, str]


def with_ids(items: Sequence[LabelledMedia]) -> list[LabelledMedia]:
    """Return the items with their ids. Equal items are numbered.

    Raises `OSError` for a file that cannot be read, and `ValueError` or `TypeError` for what is not media.
    """
    repeats: Counter[str] = Counter()
    numbered = []
    for item in items:
        content_id = _content_id(item)
        repeats[content_id] += 1
        number = repeats[content_id]
        numbered.append(replace(item, id=content_id if number == 1 else f"{content_id}.{number}"))
    return numbered


def is_of_file(example_id: str, files_in_ids: Collection[str]) -> bool:
    """Return whether `with_ids` made this id for one of the files, with any content."""
    return is_content_id(example_id) and example_id.partition(":")[0] in files_in_ids


def is_content_id(example_id: str) -> bool:
    """Return whether an id has the form of those of `with_ids`."""
    return CONTENT_ID.fullmatch(example_id) is not None


def _content_id(item: LabelledMedia) -> str:
    """Return the file's path in characters that an id may have, and a digest of everything in the example.

    Without a path, the id begins with the colon.
    """
    fields = {"label": item.label, "answer": item.answer, "question": item.question}
    digest = hashlib.blake2b(json.dumps([item.file, *fields.values()]).encode(), digest_size=DIGEST_BYTES)
    try:
        check_values(fields)
        digest.update(_content(item.media))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{item.name}: {error}") from error
    return f"{item.file_in_id}:{digest.hexdigest()}"


def without_accents(text: str) -> str:
    """Return a text with letters of ASCII in place of the accented ones, for ids and names, which have no others."""
    letters = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _content(media: Media) -> bytes:
    if isinstance(media, str) and (is_url(media) or is_stored(media)):
        return media.encode()
    return encode_media(media)[0]
