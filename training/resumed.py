"""Compares the settings of a run with those of the checkpoint from which it resumes; other settings are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.config import ConfigError, fingerprint
from model.folder import CONFIG, WEIGHTS
from training.config import GENERATED_SETS, TrainConfig
from training.contrastive.config import ContrastiveConfig
from training.data.stream import find_shards
from training.stored_runs import config_settings

# a resumed run may change them; they affect neither the examples nor the definition of an update
FREE_FIELDS = (
    "out",
    "name",
    "steps",
    "pack_tokens",
    "activation_checkpointing",
    "held_out",
    "checkpoint_steps",
    "log_steps",
)
# the shards of a set, and the digests of files that a setting names by their path
SHARD_FILES, VISION_DIGEST, TOKENIZER_DIGEST = "shard_files", "vision_sha256", "tokenizer_sha256"
# settings that stand for files by a digest, except for the default model
DIGESTS = ("model", VISION_DIGEST, TOKENIZER_DIGEST)
ABSENT_IN_OLD_CHECKPOINTS = (SHARD_FILES, VISION_DIGEST, TOKENIZER_DIGEST)


def resumed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings on which a run depends; the initial model counts by its weights, wherever its folder is."""
    on_disk = {data_set.name: data_set.shards for data_set in config.sets if data_set.kind not in GENERATED_SETS}
    settings = _settings_by_set(config_settings(config), on_disk)
    if config.model != "default":
        settings["model"] = fingerprint(Path(config.model).expanduser())
    if config.vision:
        settings[VISION_DIGEST] = _digest(*(Path(config.vision).expanduser() / name for name in (CONFIG, WEIGHTS)))
    return settings


def resumed_contrastive_settings(config: ContrastiveConfig) -> dict[str, Any]:
    settings = json.loads(json.dumps(asdict(config)))
    settings["text"][TOKENIZER_DIGEST] = _digest(Path(config.text.tokenizer).expanduser())
    return _settings_by_set(settings, {pairs.name: pairs.shards for pairs in config.sets})


def _digest(*files: Path) -> str:
    """Return the first digits of a digest of the files' contents, which a path does not identify."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def _settings_by_set(settings: dict[str, Any], on_disk: Mapping[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in FREE_FIELDS}
    sets = {fields.pop("name"): fields for fields in kept["sets"]}
    for name, pattern in on_disk.items():
        sets[name][SHARD_FILES] = describe_files(find_shards(pattern))
    return {**kept, "sets": sets}


def describe_files(files: Sequence[Path]) -> str:
    """Return the number of the files and a digest of their names and sizes, which decide the order of the examples."""
    listing = json.dumps([[str(file), file.stat().st_size] for file in files])
    return f"{len(files)} files ({hashlib.sha256(listing.encode()).hexdigest()[:12]})"


def check_unchanged(checkpoint: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raise `ConfigError` if the checkpoint is of a run with other settings; old checkpoints have none (None)."""
    if before is not None and (changed := list(_changes(before, now))):
        raise ConfigError(
            f"{checkpoint} cannot be continued with other settings: {', '.join(changed)}. Restore them, or change out"
        )


def check_steps(checkpoint: Path, num_steps_done: int, steps: int) -> None:
    """Raise `ConfigError` if the checkpoint has more steps than the run is to have."""
    if num_steps_done > steps:
        raise ConfigError(f"steps is {steps}, but {checkpoint} has more: raise steps, or change out")


def _changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    for name in [*before, *(now.keys() - before.keys())]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{path}{name}.")
        elif isinstance(old, dict) or isinstance(new, dict):
            yield f"{path}{name} was {'removed' if new is None else 'added'}"
        elif old != new and name in DIGESTS and not {None, "default"} & {old, new}:
            yield f"the files of {path}{name.removesuffix('_sha256')} have changed"
        elif old != new and (old is not None or name not in ABSENT_IN_OLD_CHECKPOINTS):
            yield f"{path}{name} was {old} and is {new}"
