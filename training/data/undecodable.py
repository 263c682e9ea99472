"""Remembers the media of a run that cannot be decoded, so that no later pass over the shards tries them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from model.media import MediaError
from training.data.bad_record_log import BadRecord


@dataclass(frozen=True, slots=True)
class Undecodable:
    """The errors of media that cannot be decoded, by digest: a long clip takes seconds to fail."""

    _problems: dict[bytes, str] = field(default_factory=dict)

    @contextmanager
    def tried_once(self, digest: bytes) -> Iterator[None]:
        """Raise BadRecord for a MediaError of the block, and at once for media that failed before."""
        if (problem := self._problems.get(digest)) is not None:
            raise BadRecord("media cannot be decoded", problem)
        try:
            yield
        except MediaError as error:
            self._problems[digest] = str(error)
            raise BadRecord("media cannot be decoded", str(error)) from None
