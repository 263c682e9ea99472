"""The concepts of the emoji packages, with names, tags and kinds from emojibase; they are looked up by name or code.

Skin tones, flags, letters and signs are excluded: their images differ by a colour or a letter, which the model cannot read.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.default_data.packages import read_json

EXCLUDED_GROUPS = {"component", "flags"}
EXCLUDED_KINDS = {
    "arrow", "zodiac", "av-symbol", "gender", "math", "punctuation", "currency", "keycap", "alphanum", "time",
    "transport-sign", "other-symbol", "family", "person-symbol",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Concept:
    label: str
    code: str
    kind: str
    tags: tuple[str, ...]


class Concepts:
    """An index of concepts by the names and codes that icon sets use."""

    def __init__(self, archive: Path) -> None:
        with tarfile.open(archive) as package:
            data = read_json(package, "en/data.json")
            groups = read_json(package, "meta/groups.json")
            unicode_names = read_json(package, "meta/unicode-names.json")
        concepts = list(_concepts(data, groups))
        self.by_code = {_normalise_code(concept.code): concept for concept in concepts}
        self.by_name = {normalise_name(unicode_names.get(c.code, c.label)): c for c in concepts}
        self.by_name |= {normalise_name(concept.label): concept for concept in concepts}

    def find_by_name(self, icon: str) -> Concept | None:
        """Find a concept by an icon's name; a numbered variant ("clinking-glasses-2") belongs to the unnumbered concept."""
        return self.by_name.get(normalise_name(icon)) or self.by_name.get(normalise_name(re.sub(r"-\d+$", "", icon)))

    def find_by_code(self, code: str) -> Concept | None:
        return self.by_code.get(_normalise_code(code))


def _concepts(data: list[dict[str, Any]], groups: dict[str, Any]) -> Iterator[Concept]:
    for entry in data:
        if "group" not in entry:
            continue
        group, kind = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        if group not in EXCLUDED_GROUPS and kind not in EXCLUDED_KINDS:
            tags = tuple(tag for tag in entry.get("tags", ()) if tag.isascii() and len(tag) > 2)
            yield Concept(entry["label"], entry["hexcode"], kind.replace("-", " "), tags)


def _normalise_code(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def normalise_name(name: str) -> str:
    """Reduce a name to letters and digits; icon sets differ in everything else."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
