"""The images of a test folder: those that are not examples of a set, and tables of how many are labelled as expected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flamboyance_client.accuracy import Accuracy, check_labels
from flamboyance_client.cli.tables import print_table
from flamboyance_client.client import Client
from flamboyance_client.errors import BadRequest
from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.folders import labelled_files
from flamboyance_client.steps import run
from flamboyance_client.stored import SupportSetCalls
from flamboyance_client.uploads import TOO_MANY_PIXELS

MAX_MISTAKES = 10
# of one request that looks for images which the set has: a body has at most 64 MiB by default, in base64
MAX_POOL, MAX_POOL_BYTES = 16, 24 << 20
# a difference that is as large by chance in more than one of 20 comparisons is not reported as one
SIGNIFICANCE = 0.05


def held_out(client: Client, name: str, folder: Path) -> tuple[list[tuple[AnyQuery, str]], int]:
    """Return the images of a folder with their labels, without examples of a set, and how many of those there were.

    Raises `ValueError` for a label that no answer by the set can have, and if no image is left.
    """
    files = [(Path(file.name), str(file.label)) for file in labelled_files(folder)]
    # before the images are sent
    run(client._send, check_labels(SupportSetCalls(), [label for _, label in files], {"examples": name}))
    queries = [query for pool in _pools(files) for query in _unknown(client, name, pool)]
    if not queries:
        raise ValueError(f"all images of {folder} are examples of the set: a test needs others")
    return queries, len(files) - len(queries)


def _pools(files: Sequence[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    """Yield the files in groups that fit into a request."""
    pool: list[tuple[Path, str]] = []
    num_bytes = 0
    for path, label in files:
        size = path.stat().st_size
        if pool and (len(pool) == MAX_POOL or num_bytes + size > MAX_POOL_BYTES):
            yield pool
            pool, num_bytes = [], 0
        pool.append((path, label))
        num_bytes += size
    yield pool


def _unknown(client: Client, name: str, pool: Sequence[tuple[Path, str]]) -> list[tuple[AnyQuery, str]]:
    """Return the images of a pool that the set does not have. Raises `ValueError` for a file that cannot be decoded."""
    try:
        known = client.support_sets.suggest(name, [path for path, _ in pool], count=1).known
    except BadRequest as error:
        if error.code == TOO_MANY_PIXELS and len(pool) > 1:
            middle = len(pool) // 2
            return _unknown(client, name, pool[:middle]) + _unknown(client, name, pool[middle:])
        if (at := re.match(r"pool\[(\d+)\]", error.param or "")) is None:
            raise
        raise ValueError(f"{pool[int(at[1])][0]}: {error.message}") from error
    return [query for index, query in enumerate(pool) if index not in known]


def print_accuracies(accuracies: Sequence[Accuracy], num_known: int) -> None:
    first = accuracies[0]
    table = Table("method", "accuracy", "95%", "labelled", f"against {first.method}", title=_title(first, num_known))
    for row in accuracies:
        name = row.method if row.method == row.used else f"{row.method} ({row.used})"
        table.add_row(name, *_numbers(row), "" if row is first else _difference(row, first))
    print_table(table)
    if first.mistakes:
        mistakes = Table("expected", "answered", "images", title=f"Mistakes of {first.method}")
        for (expected, answer), count in sorted(first.mistakes.items(), key=lambda item: -item[1])[:MAX_MISTAKES]:
            mistakes.add_row(expected, answer, str(count))
        print_table(mistakes)


def as_document(row: Accuracy, num_known: int) -> dict[str, Any]:
    return {
        "examples_left_out": num_known,
        "method": row.method,
        "used": row.used,
        "queries": row.queries,
        "labelled": row.labelled,
        "correct": row.correct,
        "accuracy": row.accuracy,
        "accuracy_interval": row.accuracy_interval,
        "mistakes": [
            {"expected": expected, "answered": answer, "count": count}
            for (expected, answer), count in row.mistakes.items()
        ],
    }


def _title(row: Accuracy, num_known: int) -> str:
    return f"{row.queries} images" + (f", without {num_known} that are examples of the set" if num_known else "")


def _numbers(row: Accuracy) -> tuple[str, str, str]:
    if row.accuracy is None or row.accuracy_interval is None:
        return "", "", "0"
    lowest, highest = row.accuracy_interval
    return f"{row.accuracy:.3f}", f"{lowest:.3f} to {highest:.3f}", str(row.labelled)


def _difference(row: Accuracy, first: Accuracy) -> str:
    comparison = row.compare(first)
    difference = comparison.only_first - comparison.only_second
    if not difference:
        return "as many correct"
    text = f"{abs(difference)} {'more' if difference > 0 else 'fewer'} correct"
    return text if comparison.p_value < SIGNIFICANCE else f"{text}, which may be chance"
