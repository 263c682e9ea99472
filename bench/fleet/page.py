"""Writes the tables of the studies into docs/scale.md: each replaces the block of code that has the study's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.table import ROOT, Row, format_table

PAGE = ROOT / "docs" / "scale.md"


def with_tables(page: str, tables: Mapping[str, Sequence[Row]]) -> str:
    """Return the page with these tables. Raises `ValueError` if it has no block for one of them."""
    for name, rows in tables.items():
        begin = f"```text {name}\n"
        if (count := page.count(begin)) != 1:
            raise ValueError(f"the page has {count} blocks that begin with ```text {name}")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{format_table(rows)}\n```{rest.partition('```')[2]}"
    return page


def write(file: Path, tables: Mapping[str, Sequence[Row]]) -> None:
    file.write_text(with_tables(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
