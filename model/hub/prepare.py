"""`prepare` turns a model's name into a model folder: found in the cache, or downloaded and imported once.

The import runs in a separate process, so this one does not load torch, and the memory is released before a server starts.
The folder's name contains the repository, the commit and the version of the converter, so that another commit or converter
gets another folder.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import msgspec

from model.cache import is_ready, run_import
from model.config import ConfigError, load_config
from model.hub.inputs import describe, fetch_checkpoint, fetch_model, fetch_vision_model
from model.hub.job import (
    CONVERTER_VERSION,
    Idefics,
    Job,
    ModelFolder,
    OpenFlamingo,
    Origin,
)
from model.hub.published import CLIP_VIT_L_14, OPENFLAMINGO, Experts, experts_of_folder, supported
from model.hub.sources import (
    CHECKPOINT,
    DEFAULT_REVISION,
    METADATA,
    HubUnreachable,
    LocalFolder,
    ModelNameError,
    Repository,
    Source,
    open_source,
    read_object,
)

logger = logging.getLogger(__name__)


def prepare(name: str, cache: Path) -> Path:
    """Return the model folder of a name: a folder, or a repository `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Several processes may call this at once. Raises `ModelNameError`.
    """
    try:
        source = open_source(name)
    except HubUnreachable as error:
        if (folder := _last_import(name, cache)) is None:
            raise
        logger.warning("%s. The last imported version of %s is served", error, name)
        return folder
    if isinstance(source, LocalFolder) and _kind(source) == "model folder":
        _check_model_folder(source)
        return source.path
    folder = locate(source, cache)
    if not is_ready(folder):
        _check_cache(cache.absolute())
        _run(plan(source, folder))
    if isinstance(source, Repository):
        _store_commit(source, cache)
    return folder


def _check_cache(cache: Path) -> None:
    """Check before a download that folders can be created in the cache. Raises `ModelNameError`."""
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ModelNameError(f"the cache {cache} cannot be used: {existing} is not a folder that can be written")


def locate(source: Source, cache: Path) -> Path:
    """Return the path of the imported folder, which may not exist yet."""
    return cache.absolute() / f"{source.name.replace('/', '--')}-{source.key[:12]}-{CONVERTER_VERSION}"


def _commit_file(name: str, revision: str, cache: Path) -> Path:
    """Return the file with the commit that a revision of a repository had when it was last prepared."""
    return cache.absolute() / f".{name.replace('/', '--')}@{quote(revision, safe='')}"


def _store_commit(source: Repository, cache: Path) -> None:
    file = _commit_file(source.name, source.revision, cache)
    try:
        if not file.is_file() or file.read_bytes() != source.commit.encode():
            partial = file.with_name(f"{file.name}.{os.getpid()}")
            partial.write_text(source.commit, encoding="utf-8")
            partial.replace(file)
    except OSError as error:
        logger.warning("a start without a hub may not find %s: %s", source, error)


def _last_import(text: str, cache: Path) -> Path | None:
    """Return the folder that was last prepared for the same repository and revision, if it is still there."""
    name, _, revision = text.partition("@")
    revision = revision or DEFAULT_REVISION
    try:
        commit = _commit_file(name, revision, cache).read_bytes().decode("ascii", "replace")
    except OSError:
        return None
    folder = locate(Repository(name, revision, commit), cache)
    return folder if is_ready(folder) else None


def plan(source: Source, folder: Path) -> Job:
    """Download what the import of `source` reads. Raises `ModelNameError`, before any download if it is not supported."""
    inputs, origin = PLANS[_kind(source)](source)
    return Job(name=source.name, folder=str(folder), source=inputs, origin=origin)


def _kind(source: Source) -> str:
    config = read_object(source, "config.json")
    if CHECKPOINT in source.names and "format_version" not in config:
        return "openflamingo"
    kind = config.get("model_type", "model folder")
    if kind not in tuple(PLANS):
        raise ModelNameError(f"{source} is a model of the type {kind!r}, which is not supported. {supported()}")
    return str(kind)


def _plan_openflamingo(source: Source) -> tuple[OpenFlamingo, Origin]:
    experts = _experts(source)
    language_model, vision_model = open_source(experts.language_model), open_source(experts.vision_model)
    origin = describe({"checkpoint": source, "language model": language_model, "vision model": vision_model})
    inputs = OpenFlamingo(
        checkpoint=str(fetch_checkpoint(source)),
        language_model=str(fetch_model(language_model)),
        vision_model=str(fetch_vision_model(vision_model)),
        every_n_layers=experts.every_n_layers,
    )
    return inputs, origin


def _experts(source: Source) -> Experts:
    """Return the frozen models of an OpenFlamingo. Raises `ModelNameError` if they are unknown or not distributed."""
    experts = experts_of_folder(source.path) if isinstance(source, LocalFolder) else OPENFLAMINGO.get(source.name)
    interval = "N" if experts is None else experts.every_n_layers
    command = (
        f"flamboyance import openflamingo --checkpoint {source} --language-model LANGUAGE_MODEL "
        f"--vision-model {CLIP_VIT_L_14} --cross-attn-every-n-layers {interval} --out FOLDER"
    )
    if experts is None:
        raise ModelNameError(f"{source} is an OpenFlamingo whose frozen models are not known; specify them: {command}")
    if not experts.language_model:
        raise ModelNameError(
            f"{source} needs LLaMA-7B, which is not openly distributed; if you have it in Hugging Face's format: {command}"
        )
    return experts


def _plan_idefics(source: Source) -> tuple[Idefics, Origin]:
    origin = describe({"model": source})
    return Idefics(folder=str(fetch_model(source))), origin


def _check_model_folder(source: Source) -> None:
    try:
        load_config(source.fetch(METADATA))
    except ConfigError as error:
        raise ModelNameError(f"{source} is not a model that is supported ({error}). {supported()}") from None


def _plan_model_folder(source: Source) -> tuple[ModelFolder, Origin]:
    _check_model_folder(source)
    origin = describe({"model": source})
    return ModelFolder(folder=str(fetch_model(source))), origin


Planned = tuple[OpenFlamingo | Idefics | ModelFolder, Origin]
PLANS: Mapping[str, Callable[[Source], Planned]] = MappingProxyType(
    {"openflamingo": _plan_openflamingo, "idefics": _plan_idefics, "model folder": _plan_model_folder}
)


def _run(job: Job) -> None:
    """Run an import in a separate process. Raises `ModelNameError` with the message of that process."""
    finished = run_import("model.hub.convert", job=msgspec.json.encode(job))
    if finished.returncode:
        is_killed = finished.returncode == -signal.SIGKILL
        status = f"its process ended with status {finished.returncode}{', perhaps for lack of memory' * is_killed}"
        raise ModelNameError(f"{job.name} cannot be imported: {finished.stdout.decode().strip() or status}")
