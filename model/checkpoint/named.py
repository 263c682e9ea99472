"""Experts as a command names them: a folder, a repository of the Hub, `default`, or the GGUF file of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from model.checkpoint.gguf import GGUFFile
from model.hub.inputs import describe, fetch_model, open_expert
from model.hub.job import Origin, Part
from model.hub.sources import UNSTATED, Source


def open_language_model(text: str) -> Source | Path:
    """Return the source that `text` names, or the path of a GGUF file. Raises `ModelNameError`."""
    file = Path(text)
    return file if file.is_file() else open_expert(text)


def fetch_language_model(source: Source | Path) -> Path:
    return source if isinstance(source, Path) else fetch_model(source)


def describe_experts(sources: Mapping[str, Source | Path]) -> Origin:
    """Return where experts come from; the licence of a GGUF file is the one that the file states."""
    origins = [
        Origin(parts=(_file_part(name, source),)) if isinstance(source, Path) else describe({name: source})
        for name, source in sources.items()
    ]
    return Origin(revision=origins[0].revision, parts=tuple(part for origin in origins for part in origin.parts))


def _file_part(name: str, file: Path) -> Part:
    return Part(part=name, repository=file.name, commit="", license=GGUFFile(file).license or UNSTATED)
