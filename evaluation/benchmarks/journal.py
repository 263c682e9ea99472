"""Stores the answers of a run in a file: a line with the settings, then a line per query, written when it is answered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def digest(settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=5).hexdigest()


class Journal:
    """The outcomes of a run by the ids of its queries. A run with other settings has another file.

    An incomplete last line of a killed process is removed. The block raises ValueError for a file whose settings do not
    match its name, for a line that is no outcome, and for a file that another run writes.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}-{digest(settings)}.jsonl"
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._settings = settings

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as unless_read:
            self._file = unless_read.enter_context(self.path.open("a", encoding="utf-8"))
            try:
                flock(self._file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run writes {self.path}: wait for it, or give another --out") from None
            self._read()
            unless_read.pop_all()
        return self

    def _read(self) -> None:
        """Read the answers of an earlier run, or write the settings if the file has no finished line."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        self._file.truncate(end)
        if not end:
            self._write({"settings": self._settings})
            return
        header, *lines = [self._parse(number, line) for number, line in enumerate(data[:end].splitlines(), 1)]
        if header != {"settings": json.loads(json.dumps(self._settings))}:
            raise ValueError(f"{self.path} has the answers of a run with other settings: move it elsewhere")
        for number, outcome in enumerate(lines, 2):
            if not _is_outcome(outcome):
                raise self._damaged(number, f"{outcome!r:.60} is no answer")
            self.outcomes[outcome["id"]] = outcome

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(number, str(error)) from None

    def _damaged(self, number: int, problem: str) -> ValueError:
        return ValueError(f"{self.path}, line {number} is damaged: {problem}; remove the line to ask again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, outcome: dict[str, Any]) -> None:
        self.outcomes[outcome["id"]] = outcome
        self._write(outcome)

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()


def _is_outcome(values: Any) -> bool:
    match values:
        case {"id": str(), "text": str()}:
            return True
        case {"id": str(), "ranked": [_, *_] as ranked}:
            return all(map(_is_ranked, ranked))
    return False


def _is_ranked(candidate: Any) -> bool:
    match candidate:
        case [str(), int() | float() as share]:
            return math.isfinite(share)
    return False
