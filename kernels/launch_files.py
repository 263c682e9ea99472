"""Reads launch files: measured launches for one kind of card, whose rows replace those of the launch table.

`python -m kernels.bench --launches FILE` writes such a file: a JSON list of {"operator", "architecture", "head_dim",
"dtype", "block", "num_warps", "num_stages"}. The files in `kernels/launches` are part of the distribution; each is named
after its card.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kernels.backend import DEFAULTS, TABLE, Key, Launch, architecture

FOLDER = Path(__file__).with_name("launches")
FIELDS: dict[str, type] = {
    "operator": str, "architecture": str, "head_dim": int, "dtype": str, "block": int, "num_warps": int, "num_stages": int,
}  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")
BLOCKS, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), range(1, 9)
# with other tiles or warps, decode would sum a row in another order than prefill
MEDIA_BLOCKS, MEDIA_WARPS = (16, 32), (4,)


class LaunchFileError(ValueError):
    """A launch file that cannot be used; the message names the file, and the row if one is wrong."""


def shipped_file(card: str, folder: Path = FOLDER) -> Path | None:
    """Return the file for a card such as "NVIDIA H100 80GB HBM3", or None if it has not been measured."""
    file = folder / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    return file if file.is_file() else None


def load_launches(file: Path) -> int:
    """Replace rows of the table by those of a file, and return how many of them are for this machine's architecture.

    Raises `LaunchFileError`, and replaces nothing, if any row is wrong or if all are for other architectures.
    """
    rows = read_launches(file)
    number = sum(key[1] == architecture() for key in rows)
    if rows and not number:
        architectures = ", ".join(sorted({key[1] for key in rows}))
        raise LaunchFileError(f"{file} has rows for {architectures}, but none for {architecture()}")
    TABLE.update(rows)
    return number


def read_launches(file: Path) -> dict[Key, Launch]:
    """Return the rows of a file by key. Raises `LaunchFileError`."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchFileError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:  # not UTF-8, or not JSON
        raise LaunchFileError(f"{file} is not JSON") from None
    if not isinstance(rows, list):
        raise LaunchFileError(f"{file} contains a {type(rows).__name__}, not a list of launches")
    launches: dict[Key, Launch] = {}
    for number, row in enumerate(rows, 1):
        if reason := _fault(row):
            raise LaunchFileError(f"{file}, row {number}: {reason}")
        key = (row["operator"], row["architecture"], row["head_dim"], row["dtype"])
        if key in launches:
            raise LaunchFileError(f"{file}, row {number}: there is another row for {' '.join(map(str, key))}")
        launches[key] = Launch(row["block"], row["num_warps"], row["num_stages"])
    return launches


def _fault(row: Any) -> str | None:
    """Return what is wrong with a row, or None."""
    if not isinstance(row, dict) or row.keys() != FIELDS.keys():
        return f"it is not an object with the fields {', '.join(FIELDS)}"
    for name, kind in FIELDS.items():
        if type(row[name]) is not kind:
            return f"{name} is {row[name]!r}, must be of type {kind.__name__}"
    is_media = row["operator"] == "media"
    permitted = {
        "operator": DEFAULTS,
        "dtype": DTYPES,
        "block": MEDIA_BLOCKS if is_media else (1,) if row["operator"] == "row" else BLOCKS,
        "num_warps": MEDIA_WARPS if is_media else WARPS,
        "num_stages": STAGES,
    }
    for name, values in permitted.items():
        if row[name] not in values:
            return f"{name} {row[name]!r} is not one of {', '.join(map(str, values))}"
    return None
