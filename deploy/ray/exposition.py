"""Merges the metrics of all replicas into one text: each sample gets the name of its replica as a label.

The texts are those of prometheus_client, and stay text: to parse the samples of a fleet would stop a gateway for seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LABEL = "replica"
# the name of a sample and its labels; a line break in a label is escaped, and the value after the labels has no brace
_SAMPLE = re.compile(rb"^([\w:]+)(?:\{(.+)\})? ", re.MULTILINE)
# the description and the samples of a metric
_FAMILY = re.compile(rb"^(# HELP (\S+) .*\n# TYPE .*\n)((?:[^#].*\n)*)", re.MULTILINE)


def labelled(text: bytes, replica: str) -> bytes:
    """Return the text of a replica with the label that names it, the last one of each sample."""
    label = f'{LABEL}="{replica}"'.encode()
    return _SAMPLE.sub(lambda match: b"%b{%b} " % (match[1], b",".join(filter(None, [match[2], label]))), text)


def merge(texts: Iterable[bytes]) -> bytes:
    """Return one text in which each metric is described once, followed by its samples from all texts."""
    families: dict[bytes, list[bytes]] = {}
    for text in texts:
        for description, name, samples in _FAMILY.findall(text):
            families.setdefault(name, [description]).append(samples)
    return b"".join(part for parts in families.values() for part in parts)
