"""Examples in the rows of a data frame of pandas or polars, neither of which is imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeGuard
from unicodedata import normalize

from flamboyance_client.fewshot import is_stored
from flamboyance_client.labelled import LabelledMedia
from flamboyance_client.prompt import is_url


class Frame(Protocol):
    """The part of a data frame that the client uses: the names of its columns, and their values by name."""

    @property
    def columns(self) -> Any: ...
    def __getitem__(self, column: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The names of the columns of examples. None means that the examples have no such field."""

    image: str
    label: str | None
    answer: str | None
    question: str | None


def labelled_rows(frame: Frame, columns: Columns, root: str | Path) -> list[LabelledMedia]:
    """Return the rows of a data frame, with labels in NFC. Relative paths of images are relative to `root`.

    Raises `ValueError` for a column that does not exist or that two columns may be, for columns of different lengths, for
    a value of another type and for a frame without rows.
    """
    named = {"label": columns.label, "answer": columns.answer, "question": columns.question}
    images = _values(frame, columns.image)
    if empty := [row for row, cell in enumerate(images) if isinstance(cell, str) and not cell]:
        raise ValueError(f"row {empty[0]}, column {columns.image!r}: expected a path, a URL or an image, got ''")
    texts = {field: _texts(frame, column) for field, column in named.items() if column is not None}
    if "label" in texts:
        texts["label"] = [normalize("NFC", label) for label in texts["label"]]
    for field, values in texts.items():
        if len(values) != len(images):
            lengths = f"{len(values)} values, and the column {columns.image!r} has {len(images)}"
            raise ValueError(f"the column {named[field]!r} has {lengths}")
    rows = [
        LabelledMedia(
            name=f"row {row}",
            media=root / Path(cell) if _is_path(cell) else cell,
            file=str(cell) if _is_path(cell) else "",
            **{field: values[row] for field, values in texts.items()},
        )
        for row, cell in enumerate(images)
    ]
    if not rows:
        raise ValueError("the data frame has no rows")
    return rows


def _texts(frame: Frame, column: str) -> list[str]:
    return [text_of(value, f"row {row}, column {column!r}") for row, value in enumerate(_values(frame, column))]


def _values(frame: Frame, column: str) -> list[Any]:
    if column not in (names := list(frame.columns)):
        raise ValueError(f"the data frame has no column {column!r}; its columns are {', '.join(map(repr, names))}")
    if (count := names.count(column)) > 1:
        raise ValueError(f"the data frame has {count} columns {column!r}: give each another name")
    values: Iterable[Any] = frame[column]
    return list(values)


def _is_path(cell: Any) -> TypeGuard[str | Path]:
    return isinstance(cell, Path) or (isinstance(cell, str) and not is_url(cell) and not is_stored(cell))


def text_of(value: Any, where: str) -> str:
    """Return a text or a whole number as a text. Raises `ValueError` for an empty text and for any other value."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Integral) and value is not True and value is not False:
        return str(value)
    raise ValueError(f"{where}: expected a text or a whole number, got {value!r}")
