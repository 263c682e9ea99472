"""Merges the metrics of all replicas into one text: each sample gets the name of its replica as a label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def merge(texts: Iterable[tuple[str, Iterable[bytes]]]) -> bytes:
    """Return one text from the texts of replicas, which are by name, in which each metric is described once."""
    merged: dict[str, Metric] = {}
    for replica, parts in texts:
        for part in parts:
            for family in text_string_to_metric_families(part.decode()):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                metric.samples += [s._replace(labels={**s.labels, LABEL: replica}) for s in family.samples]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(merged.values()))
    return generate_latest(registry)
