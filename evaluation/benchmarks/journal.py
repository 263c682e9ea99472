"""Stores the answers of a run in a file: a line with the settings, then a line per query, written when it is answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def digest(settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=5).hexdigest()


class Journal:
    """The outcomes of a run by the ids of its queries. A run with other settings has another file.

    An incomplete last line of a killed process is removed. Raises ValueError for a file whose settings do not match its
    name.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}-{digest(settings)}.jsonl"
        self.outcomes: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not self._read(settings):
            self.path.write_text(json.dumps({"settings": settings}, sort_keys=True) + "\n", encoding="utf-8")

    def _read(self, settings: Mapping[str, Any]) -> bool:
        """Read the answers of an earlier run; return False if the file has no finished line."""
        data = self.path.read_bytes() if self.path.exists() else b""
        if not (end := data.rfind(b"\n") + 1):
            return False
        header, *lines = [self._parse(number, line) for number, line in enumerate(data[:end].splitlines(), 1)]
        if header != {"settings": json.loads(json.dumps(settings))}:
            raise ValueError(f"{self.path} has the answers of a run with other settings: move it elsewhere")
        self.outcomes = {outcome["id"]: outcome for outcome in lines}
        if end < len(data):
            with self.path.open("r+b") as file:
                file.truncate(end)
        return True

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number} is damaged: {error}; remove the line to ask again") from None

    def __enter__(self) -> Self:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, outcome: dict[str, Any]) -> None:
        self.outcomes[outcome["id"]] = outcome
        self._file.write(json.dumps(outcome, ensure_ascii=False) + "\n")
        self._file.flush()
