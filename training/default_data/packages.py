"""Packages of the registries, fetched by the registries' own clients into a cache: npm's and Debian's.

A package that is there is not fetched again; its version is part of its file's name.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from training.default_data.sources import Source

log = logging.getLogger(__name__)


class PackageError(RuntimeError):
    """A package could not be had; the message says which, and what the client said."""


def fetch(source: Source, cache: Path) -> Path:
    """The package's file in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / _file_name(source)
    if not file.exists():
        log.info("fetching %s %s from %s", source.package, source.version, source.registry)
        _run(_command(source), cache, source)
    if not file.exists():
        raise PackageError(f"{source.package} {source.version} was fetched, but {file} is not there")
    return file


def _file_name(source: Source) -> str:
    if source.registry == "npm":
        return f"{source.package.removeprefix('@').replace('/', '-')}-{source.version}.tgz"
    return f"{source.package}_{source.version.replace(':', '%3a')}_all.deb"


def _command(source: Source) -> list[str]:
    if source.registry == "npm":
        return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    return ["apt-get", "download", f"{source.package}={source.version}"]


def _run(command: list[str], folder: Path, source: Source) -> None:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise PackageError(f"{' '.join(command)} for {source.name} failed: {finished.stderr.strip()}")


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    stream = archive.extractfile(f"package/{name}")
    if stream is None:
        raise PackageError(f"{archive.name!r} holds no {name}")
    return json.load(stream)


def unpack_debian(file: Path, folder: Path) -> Path:
    """The package's files under `folder`, unpacked once."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(file), str(folder)], check=True)
    return folder
