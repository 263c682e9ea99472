"""Reads the dashboard in `grafana/` as panels and their queries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "grafana" / "dashboards" / "flamboyance.json"
COLUMNS = 24
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


class Query(NamedTuple):
    """A query of a panel, in PromQL, and the template of its lines' labels."""

    panel: str
    legend: str
    expression: str

    def with_variables(self, rate_interval: str) -> str:
        """Return the expression for all servers, with rates over an interval such as `1m`."""
        return self.expression.replace("$instance", ".*").replace("$__rate_interval", rate_interval)

    def label(self, metric: Mapping[str, str]) -> str:
        """Return the label of a line, as Grafana writes it."""
        return re.sub(r"{{(\w+)}}", lambda match: metric.get(match[1], ""), self.legend)


class Panel(NamedTuple):
    """A panel, and its place in a grid of `COLUMNS` columns."""

    title: str
    unit: str
    x: int
    y: int
    width: int
    height: int
    queries: list[Query]


def sections() -> Iterator[tuple[str, list[Panel]]]:
    """Yield the titles of the dashboard's rows, each with its panels."""
    title, panels = "", list[Panel]()
    for entry in DASHBOARD["panels"]:
        if entry["type"] == "row":
            if panels:
                yield title, panels
            title, panels = entry["title"], []
        else:
            panels.append(_panel(entry))
    yield title, panels


def _panel(entry: dict[str, Any]) -> Panel:
    grid, title = entry["gridPos"], entry["title"]
    queries = [Query(title, target["legendFormat"], target["expr"]) for target in entry["targets"]]
    unit = entry["fieldConfig"]["defaults"]["unit"]
    return Panel(title, unit, grid["x"], grid["y"], grid["w"], grid["h"], queries)


QUERIES = [query for _, panels in sections() for panel in panels for query in panel.queries]
