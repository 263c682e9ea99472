"""Tables of support sets and of evaluations, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flamboyance_client.chart import shots_text
from flamboyance_client.curation import Diagnostics, Suggestions
from flamboyance_client.evaluations import Evaluation, duration
from flamboyance_client.records import SupportSet

# columns of a file or a pipe, so that nothing is cut
WIDE = 200
MAX_LABELS = 20


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; elsewhere, as wide as it needs to be. Long texts are folded, not cut."""
    for column in table.columns:
        column.overflow = "fold"
    console = _console()
    (console if console.is_terminal else _console(WIDE)).print(table)


def _console(width: int | None = None) -> Console:
    """Return a console that shows labels and names as they are, also if they look like markup of rich."""
    return Console(width=width, markup=False, emoji=False)


def print_sets(sets: Sequence[SupportSet]) -> None:
    table = Table("name", "id", "version", "examples", "media", "created")
    for support_set in sets:
        values = support_set.raw
        numbers = (support_set.version, support_set.num_examples, values["num_media"])
        table.add_row(support_set.name or "", support_set.id, *map(str, numbers), _minute(values["created_at"]))
    print_table(table)


def _minute(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M")


def print_set(support_set: SupportSet) -> None:
    values = support_set.raw
    table = Table.grid(padding=(0, 2))
    for name in ("name", "id", "version", "num_examples", "num_media", "bytes", "pinned", "status"):
        table.add_row(name.removeprefix("num_"), str(values.get(name)))
    counts = list((values.get("label_counts") or {}).items())
    for label, count in counts[:MAX_LABELS]:
        table.add_row(f"label {label}", str(count))
    print_table(table)
    if (rest := len(counts) - MAX_LABELS) > 0:
        print(f"and {rest} more labels, which --json shows")


def print_evaluations(evaluations: Sequence[Evaluation], names: Mapping[str, str]) -> None:
    """Print a line for each evaluation. `names` has the names of sets by their ids."""
    table = Table("id", "set", "version", "status", "queries", "created", "time")
    for evaluation in evaluations:
        values = evaluation.raw
        queries = f"{evaluation.num_queries_done} of {evaluation.num_queries}"
        set_id = values["support_set"]
        about = (names.get(set_id, set_id), str(values["version"]), evaluation.status)
        table.add_row(evaluation.id, *about, queries, _minute(values["created_at"]), _time(evaluation))
    print_table(table)


def _time(evaluation: Evaluation) -> str:
    """Return the time that an evaluation took, or that it still takes."""
    began, ended = evaluation.raw.get("started_at"), evaluation.raw.get("finished_at")
    return evaluation.time_left if began is None or ended is None else duration(ended - began)


def print_evaluation(evaluation: Evaluation, program: str) -> None:
    values = evaluation.raw
    table = Table(
        "method", "k", "accuracy", "95%", "ms", title=f"{values['queries']} of {values['examples']} examples left out"
    )
    if evaluation.baseline is not None:
        table.add_row("always the most common label", "", f"{evaluation.baseline.accuracy:.3f}", "", "")
    for row in evaluation.summary:
        lowest, highest = row.accuracy_interval
        latency = "" if row.median_seconds is None else f"{1000 * row.median_seconds:.0f}"
        numbers = (f"{row.accuracy:.3f}", f"{lowest:.3f} to {highest:.3f}", latency)
        table.add_row(row.name, shots_text(row.k), *numbers)
    print_table(table)
    if not evaluation.is_over:
        left = f", {evaluation.time_left}" if evaluation.time_left else ""
        print(f"{evaluation.status}: {evaluation.num_queries_done} of {evaluation.num_queries} queries are done{left}")
    elif evaluation.status != "completed":
        print(f"{evaluation.status}: {(values.get('error') or {}).get('message', 'its results are incomplete')}")
    if evaluation.advice:
        print(evaluation.advice)
    if evaluation.recommendation is not None:
        print(f"To use it: {program} classify IMAGE... --recommended {evaluation.id}")


def print_diagnostics(diagnostics: Diagnostics) -> None:
    accuracy = "unknown" if diagnostics.accuracy is None else f"{diagnostics.accuracy:.3f}"
    title = f"{diagnostics.examples} examples; accuracy of each by the others: {accuracy}"
    table = Table("finding", "example", "label", "details", title=title)
    for row in _findings(diagnostics):
        table.add_row(*row)
    print_table(table)
    kinds = ("mislabelled", "harmful", "redundant", "conflicting", "confused")
    print(", ".join(f"{getattr(diagnostics, kind).count} {kind}" for kind in kinds))


def _findings(diagnostics: Diagnostics) -> Iterator[tuple[str, str, str, str]]:
    for wrong in diagnostics.mislabelled:
        yield "mislabelled", wrong.id, wrong.label, f"looks like {wrong.looks_like} ({wrong.score:.2f})"
    for harmful in diagnostics.harmful:
        yield "harmful", harmful.id, harmful.label, f"value {harmful.value:.2f}"
    for redundant in diagnostics.redundant:
        yield "redundant", redundant.id, redundant.label, f"as {redundant.duplicate_of} ({redundant.similarity:.3f})"
    for pair in diagnostics.conflicting:
        yield "conflicting", " and ".join(pair.ids), " and ".join(pair.labels), f"similarity {pair.similarity:.3f}"
    for confused in diagnostics.confused:
        yield "confused", "", " and ".join(confused.labels), f"{confused.count} examples"


def print_suggestions(suggestions: Suggestions, sources: Sequence[str | Path]) -> None:
    table = Table("image", "labels", "margin", "gain")
    for suggestion in suggestions:
        labels = ", ".join(f"{label} {share:.2f}" for label, share in suggestion.probabilities.items())
        margin = suggestion.reason.get("margin")
        numbers = ("" if margin is None else f"{margin:.2f}", f"{suggestion.reason['gain']:.4f}")
        table.add_row(str(sources[suggestion.index]), labels, *numbers)
    print_table(table)
    if suggestions.known:
        print(f"{len(suggestions.known)} images are in the set already")
