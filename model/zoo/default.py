"""Where the default model's folder is, and how it gets there: `prepare` converts it once, into a cache.

The folder's name ends in a digest of all that it is made of, so a newer bridge or converter meets no older folder.
Conversion runs in a process of its own: no torch here, and its memory is gone before a server starts.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from model.zoo.config import DEFAULT, LANGUAGE_MODEL_FILE, VISION_FILE, ExpertFile

# to be raised when the same sources would give another folder
CONVERTER_VERSION = 1
BRIDGE = Path(__file__).with_name("bridge.safetensors")
ROOT = Path(__file__).resolve().parents[2]


class DefaultModelError(RuntimeError):
    """The default model cannot be made here; the message says what to do."""


def prepare(cache: Path | None = None) -> Path:
    """The default model's folder, converted first if it is not there. Several processes may ask at once."""
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
    """The folder's place, whether or not it is there yet."""
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {VISION_FILE} {LANGUAGE_MODEL_FILE}\n{DEFAULT.to_json()}".encode())
    if BRIDGE.exists():
        digest.update(BRIDGE.read_bytes())
    cache = Path.home() / ".cache" / "flamboyance" if cache is None else cache.absolute()
    return cache / f"{DEFAULT.name}-{digest.hexdigest()[:12]}"


def is_ready(folder: Path) -> bool:
    # a folder arrives whole, so one file stands for all
    return (folder / "config.json").exists()


def find(file: ExpertFile) -> Path:
    """The installed file of an expert."""
    wanted = f"{file.distribution}=={file.version}"
    try:
        distribution = metadata.distribution(file.distribution)
    except metadata.PackageNotFoundError:
        raise DefaultModelError(f"the default model needs {wanted}, which is not installed: run `make setup`") from None
    for entry in distribution.files or ():
        if entry.name.endswith(file.suffix):
            return Path(str(entry.locate()))
    raise DefaultModelError(f"{file.distribution} {distribution.version} has no {file.suffix} file: {wanted} has one")
