"""The inputs of an import: each function downloads what an importer reads, and returns its path.

The small files are fetched and checked first, so that an unsupported model causes no large download.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from model.checkpoint.layout import OPEN_CLIP_CONFIG, OPEN_CLIP_STEMS, STEMS
from model.hub.job import SOURCE, Origin, Part
from model.hub.sources import (
    CHECKPOINT,
    METADATA,
    LocalFolder,
    ModelNameError,
    Repository,
    Source,
    license_of,
    open_source,
    read_object,
    weight_names,
)
from model.zoo.default import prepare as prepare_default

DEFAULT_MODEL = "default"

logger = logging.getLogger(__name__)


def describe(parts: Mapping[str, Source]) -> Origin:
    """Return where a model's parts come from, and log their licences; the first part has the model's name."""
    first = next(iter(parts.values()))
    described = [part for name, source in parts.items() for part in _parts(name, source)]
    for part in described:
        if part.commit:
            logger.info("%s: %s at commit %s, licence: %s", part.part, part.repository, part.commit[:12], part.license)
    return Origin(revision=first.revision if isinstance(first, Repository) else "", parts=tuple(described))


def _parts(name: str, source: Source) -> list[Part]:
    """Return the source itself, and what a published model folder was imported from."""
    commit = source.commit if isinstance(source, Repository) else ""
    try:
        earlier = msgspec.convert(read_object(source, SOURCE), Origin).parts
    except msgspec.ValidationError as error:
        raise ModelNameError(f"{source}: {SOURCE}: {error}") from None
    return [Part(part=name, repository=source.name, commit=commit, license=license_of(source)), *earlier]


def open_expert(text: str) -> Source:
    """Return the source of an expert: a folder, a repository, or the default model's folder by its name `default`."""
    return LocalFolder(prepare_default()) if text == DEFAULT_MODEL else open_source(text)


def fetch_checkpoint(source: Source) -> Path:
    """Return the `checkpoint.pt` of an OpenFlamingo. Raises `ModelNameError`."""
    if CHECKPOINT not in source.names:
        raise ModelNameError(f"{source} has no {CHECKPOINT}, so it is not an OpenFlamingo")
    return source.fetch([CHECKPOINT]) / CHECKPOINT


def fetch_model(source: Source) -> Path:
    """Return the folder of a language model, an IDEFICS or a model folder, with its tokenizer. Raises `ModelNameError`."""
    if "tokenizer.json" not in source.names:
        raise ModelNameError(f"{source} has no tokenizer.json (a fast tokenizer saves one)")
    return source.fetch([*METADATA, *weight_names(source)])


def fetch_vision_model(source: Source) -> Path:
    """Return the folder of a CLIP from transformers or open_clip. Raises `ModelNameError`."""
    stems = OPEN_CLIP_STEMS if OPEN_CLIP_CONFIG in source.names else STEMS
    return source.fetch([*METADATA, *weight_names(source, stems)])
