"""The concepts that the emoji packages draw: names, tags and kinds of emojibase, found by an icon's name or code.

Left out are skin tones, flags, letters, signs: their pictures differ by a colour or a letter, which nothing here reads.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.default_data.packages import read_json

LEFT_OUT_GROUPS = {"component", "flags"}
LEFT_OUT_KINDS = {
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
    """Lookups from what an icon set calls a concept to the concept."""

    def __init__(self, archive: Path) -> None:
        with tarfile.open(archive) as package:
            data = read_json(package, "en/data.json")
            groups = read_json(package, "meta/groups.json")
            unicode_names = read_json(package, "meta/unicode-names.json")
        concepts = list(_concepts(data, groups))
        self.by_code = {_plain(concept.code): concept for concept in concepts}
        self.by_name = {squeeze(unicode_names.get(c.code, c.label)): c for c in concepts}
        self.by_name |= {squeeze(concept.label): concept for concept in concepts}

    def named(self, icon: str) -> Concept | None:
        """By an icon's name; numbered variants ("clinking-glasses-2") are their concept's."""
        return self.by_name.get(squeeze(icon)) or self.by_name.get(squeeze(re.sub(r"-\d+$", "", icon)))

    def coded(self, code: str) -> Concept | None:
        return self.by_code.get(_plain(code))


def _concepts(data: list[dict[str, Any]], groups: dict[str, Any]) -> Iterator[Concept]:
    for entry in data:
        if "group" not in entry:
            continue
        group, kind = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        if group not in LEFT_OUT_GROUPS and kind not in LEFT_OUT_KINDS:
            tags = tuple(tag for tag in entry.get("tags", ()) if tag.isascii() and len(tag) > 2)
            yield Concept(entry["label"], entry["hexcode"], kind.replace("-", " "), tags)


def _plain(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def squeeze(name: str) -> str:
    """Letters and digits only: icon sets differ in all else."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
