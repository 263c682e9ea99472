"""Fetches packages into a cache with the registries' own clients, npm's and Debian's.

A cached package is not fetched again; its version is part of its file name. What is cached or unpacked is complete: it is
moved to its path at the end, so that a killed run leaves no part that a later run would read as the whole.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model.folder import moved_when_complete
from training.default_data.sources import Package

log = logging.getLogger(__name__)


class PackageError(RuntimeError):
    """A package could not be fetched or read; the message names it and quotes the client."""


def fetch(source: Package, cache: Path) -> Path:
    """Return the package's file in the cache, and fetch it if it is missing.

    Raises PackageError if the registry's client fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / _file_name(source)
    if not file.exists():
        log.info("fetching %s %s from %s", source.package, source.version, source.registry)
        with TemporaryDirectory(dir=cache, prefix=".") as partial:
            _run(_command(source), Path(partial), source)
            fetched = Path(partial) / file.name
            if not fetched.exists():
                raise PackageError(f"{source.package} {source.version} was fetched, but not as {file.name}")
            fetched.replace(file)
    return file


def _file_name(source: Package) -> str:
    if source.registry == "npm":
        return f"{source.package.removeprefix('@').replace('/', '-')}-{source.version}.tgz"
    return f"{source.package}_{source.version.replace(':', '%3a')}_all.deb"


def _command(source: Package) -> list[str]:
    if source.registry == "npm":
        return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    return ["apt-get", "download", f"{source.package}={source.version}"]


def _run(command: list[str], folder: Path, source: Package) -> None:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise PackageError(f"{' '.join(command)} for {source.name} failed: {finished.stderr.strip()}")


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    stream = archive.extractfile(f"package/{name}")
    if stream is None:
        raise PackageError(f"{archive.name!r} contains no {name}")
    return json.load(stream)


def unpack_debian(file: Path, folder: Path) -> Path:
    """Unpack the package into `folder`, if it does not exist, and return the folder."""
    if not folder.exists():
        with moved_when_complete(folder) as partial:
            subprocess.run(["dpkg-deb", "-x", str(file), str(partial)], check=True)
    return folder
