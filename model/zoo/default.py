"""The folder of the default model: `prepare` converts it once, into a cache.

The folder's name ends in a digest of all its sources, so that a newer bridge or converter gets a new folder. Conversion
runs in a process of its own: no torch here, and its memory is released before a server starts.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from model.zoo.config import DEFAULT, LANGUAGE_MODEL_FILE, VISION_FILE, ExpertFile

# to be incremented when the same sources would give another folder
CONVERTER_VERSION = 1
BRIDGE = Path(__file__).with_name("bridge.safetensors")
ROOT = Path(__file__).resolve().parents[2]


class DefaultModelError(RuntimeError):
    """The default model cannot be converted here; the message says what to do."""


def prepare(cache: Path | None = None) -> Path:
    """Return the default model's folder, and convert it first unless it exists; several processes may call this at once."""
    folder = locate(cache)
    if is_ready(folder):
        return folder
    vision, language_model = find(VISION_FILE), find(LANGUAGE_MODEL_FILE)
    command = [sys.executable, "-m", "model.zoo.convert", str(vision), str(language_model), str(folder)]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if finished.returncode and not is_ready(folder):
        raise DefaultModelError(f"converting the default model failed with status {finished.returncode}")
    return folder


def locate(cache: Path | None = None) -> Path:
    """Return the path of the folder, which may not exist yet."""
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {VISION_FILE} {LANGUAGE_MODEL_FILE}\n{DEFAULT.to_json()}".encode())
    if BRIDGE.exists():
        digest.update(BRIDGE.read_bytes())
    cache = Path.home() / ".cache" / "flamboyance" if cache is None else cache.absolute()
    return cache / f"{DEFAULT.name}-{digest.hexdigest()[:12]}"


def is_ready(folder: Path) -> bool:
    # a folder is moved to its path when it is complete, so one file is enough
    return (folder / "config.json").exists()


def find(file: ExpertFile) -> Path:
    """Return the installed file of an expert. Raises `DefaultModelError`."""
    required = f"{file.distribution}=={file.version}"
    try:
        distribution = metadata.distribution(file.distribution)
    except metadata.PackageNotFoundError:
        raise DefaultModelError(
            f"the default model needs {required}, which is not installed: run `make setup`"
        ) from None
    for entry in distribution.files or ():
        if entry.name.endswith(file.suffix):
            return Path(str(entry.locate()))
    raise DefaultModelError(f"{file.distribution} {distribution.version} has no {file.suffix} file: {required} has one")
