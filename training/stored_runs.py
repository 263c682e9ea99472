"""Stores a finished run as one JSON file, which is committed: its settings, the machine, and the measured values.

A file whose settings have another digest belongs to another run; the run with the current settings is then missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig

CPU_INFO = Path("/proc/cpuinfo")


# fields that were added after some runs were stored; with these values they change nothing
LATER_FIELDS = {"kin": 0, "frame_scale": 1.0}
LATER_FIELDS_OF_SETS = {"p_alone": 0.0}


def config_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration of a run as JSON values, without later fields that it does not use."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    _drop_unused(values, LATER_FIELDS)
    for fields in values["sets"]:
        _drop_unused(fields, LATER_FIELDS_OF_SETS)
    return values


def _drop_unused(fields: dict[str, Any], later: Mapping[str, Any]) -> None:
    for name, unused in later.items():
        if fields[name] == unused:
            del fields[name]


def digest_settings(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def working_folder(out: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Return the folder of a run's logs and checkpoints; other settings give another folder."""
    return out / f"{name}-{digest_settings(settings)[:8]}"


def read_run(file: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the result of a finished run; None if there is no such run, or if it has other settings."""
    if not file.exists():
        return None
    run = json.loads(file.read_text(encoding="utf-8"))
    if settings is not None and run["digest"] != digest_settings(settings):
        return None
    result: dict[str, Any] = run["result"]
    return result


def write_run(file: Path, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a finished run atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    run = {
        "digest": digest_settings(settings),
        "settings": settings,
        "machine": describe_machine(),
        "result": result,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def describe_machine() -> dict[str, Any]:
    """Return the machine, its versions and its load; a load above `threads` means that other programs were running."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
