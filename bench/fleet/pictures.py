"""The pictures of docs/scale.md, drawn from the rows of the studies' tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.table import Row

# so that equal data give equal files
STYLE: Any = {"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 9}
METADATA = {"Date": None, "Creator": None}
Draw = Callable[[Sequence[Row], Sequence[Axes]], None]


def draw(name: str, rows: Sequence[Row], folder: Path) -> Path:
    """Draw the picture of a study and return its file."""
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        _, panels = pyplot.subplots(1, 2, figsize=(8, 3))
        PICTURES[name](rows, panels)
        pyplot.tight_layout()
        pyplot.savefig(file, metadata=METADATA)
        pyplot.close()
    return file


def _groups(rows: Sequence[Row], column: str) -> Iterator[tuple[str, list[Row]]]:
    for value in dict.fromkeys(str(row[column]) for row in rows):
        yield value, [row for row in rows if str(row[column]) == value]


def _column(rows: Sequence[Row], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def _draw_replicas(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for policy, group in _groups(rows, "policy"):
        replicas = _column(group, "replicas")
        (line,) = panels[0].plot(replicas, _column(group, "hit rate"), marker="o", label=policy)
        for percentile, style in (("p50 ms", ":"), ("p95 ms", "-"), ("p99 ms", "--")):
            panels[1].plot(
                replicas, _column(group, percentile), style, color=line.get_color(), label=_label(policy, percentile)
            )
    panels[0].set(xscale="log", xlabel="replicas", ylabel="hit rate", ylim=(0, 1))
    panels[1].set(xscale="log", yscale="log", xlabel="replicas", ylabel="first token, ms")
    panels[0].legend(fontsize=7)
    panels[1].legend(fontsize=6, ncols=3)


def _label(policy: str, percentile: str) -> str:
    return f"{policy}, {percentile.removesuffix(' ms')}"


def _draw_caches(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    sizes = _column(rows, "sets cached")
    for panel, policy in zip(panels, ("affinity", "random"), strict=True):
        panel.plot(sizes, _column(rows, policy), marker="o", linestyle="", label=f"{policy}, simulated")
        panel.plot(sizes, _column(rows, f"Che, {policy}"), color="grey", label="Che's approximation")
        panel.set(xscale="log", xlabel="support sets that a replica can hold", ylabel="hit rate", ylim=(0, 1))
        panel.legend(fontsize=7)


def _draw_bounds(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for first, group in _groups(rows, "first set"):
        positions = range(len(group))
        panels[0].plot(positions, _column(group, "hit rate"), marker="o", label=f"most popular set: {first}")
        panels[1].plot(positions, _column(group, "p95 ms"), marker="o", label=f"most popular set: {first}")
        for panel in panels:
            panel.set(
                xlabel="bound of the load, times the mean", xticks=positions, xticklabels=_column(group, "factor")
            )
    panels[0].set(ylabel="hit rate")
    panels[1].set(ylabel="p95 of the first token, ms", yscale="log")
    panels[0].legend(fontsize=7)


def _draw_failures(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    names = _column(rows, "hash")
    for number, (column, label) in enumerate(
        (("slowed", "while it is absent"), ("slowed in it", "in the minute after"))
    ):
        positions = [index + 0.4 * number - 0.2 for index in range(len(rows))]
        panels[0].bar(positions, [100 * share for share in _column(rows, column)], 0.4, label=label)
    panels[0].set(ylabel="requests slowed down, %", xticks=range(len(rows)), xticklabels=names)
    panels[0].legend(fontsize=7)
    panels[1].bar(range(len(rows)), _column(rows, "recovered after s"), 0.5)
    panels[1].set(ylabel="recovery after the return, s", xticks=range(len(rows)), xticklabels=names)


def _draw_costs(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for panel, column in zip(panels, ("replicas", "per million requests"), strict=True):
        panel.bar(range(len(rows)), [value or 0 for value in _column(rows, column)], 0.5)
        panel.set(ylabel=column, xticks=range(len(rows)), xticklabels=_column(rows, "policy"))


PICTURES: Mapping[str, Draw] = {
    "replicas": _draw_replicas,
    "caches": _draw_caches,
    "bounds": _draw_bounds,
    "failures": _draw_failures,
    "costs": _draw_costs,
}
