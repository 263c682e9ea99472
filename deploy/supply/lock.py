"""Writes the locks, `deploy/locked/*.txt`, from the bounds in pyproject.toml: `python -m deploy.supply.lock [--upgrade]`.

A lock has one version of each installed distribution and the digests of its files, for all versions of Python and all
processors. uv resolves the versions, and pip installs them. PyTorch is not locked, because it has a build for each kind of
accelerator, from several indexes. Its bounds are in torch.txt.

Versions are kept while they are within the bounds. The options are those of `uv pip compile`: `--upgrade` selects the
newest versions, `--upgrade-package NAME` the newest version of one distribution.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from model.zoo.default import LANGUAGE_MODEL_FILE, VISION_FILE

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "locked"
SOURCES = ("pyproject.toml", "clients/python/pyproject.toml")
PROJECT, CLIENT = (tomllib.loads((ROOT / source).read_text(encoding="utf-8")) for source in SOURCES)
# for each lock, the extras that it covers
EXTRAS = {
    "all": ("deploy", "dev", "ray", "wups"),  # `make test-deploy`
    "tests": ("dev",),  # `make test`
    "server": ("otel", "postgresql"),  # `make serve`, the image
}
# PyTorch, its library of vision, and the libraries of CUDA that PyPI's builds depend on
UNLOCKED = re.compile(r"torch|torchvision|(cuda|nvidia)-.+")
# these versions have wheels of everything that is locked
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# newer releases are not used: a malicious release is mostly detected within days
MIN_AGE = "7 days"
HEADER = "# Written by `make lock`: see docs/operations.md.\n"


@dataclass(frozen=True, slots=True)
class Locked:
    """A distribution of a lock: one version, and the SHA-256 of each file that may be installed."""

    requirement: Requirement
    digests: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        return str(self.requirement.specifier).removeprefix("==")


def read_lock(name: str) -> list[Locked]:
    """Return the distributions of a lock."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", "")
    entries = [line.split("--hash=sha256:") for line in text.splitlines() if line[:1].isalnum()]
    return [Locked(Requirement(first), tuple(map(str.strip, digests))) for first, *digests in entries]


def required(name: str) -> list[Requirement]:
    """Return the direct requirements of the projects for a lock, with their bounds."""
    projects = [PROJECT] if name == "server" else [PROJECT, CLIENT]
    texts = [text for project in projects for text in [*project["build-system"]["requires"], *_dependencies(project)]]
    return [*map(Requirement, texts), *(r for extra in EXTRAS[name] for r in _expand(extra))]


def _dependencies(project: dict[str, dict[str, list[str]]]) -> list[str]:
    return project["project"]["dependencies"]


def _expand(extra: str) -> Iterator[Requirement]:
    """Yield the requirements of an extra, and of the extras that it names."""
    for requirement in map(Requirement, PROJECT["project"]["optional-dependencies"][extra]):
        if requirement.name == PROJECT["project"]["name"]:
            for inner in sorted(requirement.extras):
                yield from _expand(inner)
        else:
            yield requirement


def main(options: Sequence[str]) -> int:
    torch = [str(requirement) for requirement in required("server") if UNLOCKED.fullmatch(requirement.name)]
    _write("torch", "\n".join([*torch, "torchvision"]) + "\n")
    _compile("model", ["-", "--no-deps"], input=[VISION_FILE.requirement, LANGUAGE_MODEL_FILE.requirement])
    for name, extras in EXTRAS.items():
        sources = SOURCES[:1] if name == "server" else SOURCES
        agreement = [] if name == "all" else ["--constraints", str(FOLDER / "all.txt")]
        build = [text for project in (PROJECT, CLIENT)[: len(sources)] for text in project["build-system"]["requires"]]
        _compile(name, [*sources, "-", *(f"--extra={extra}" for extra in extras), *agreement, *options], input=build)
    return 0


def _compile(name: str, arguments: Iterable[str], input: Sequence[str]) -> None:
    """Resolve requirements to a lock with wheels only, so that installation runs no code of a distribution."""
    fixed = ["--universal", f"--python-version={PYTHONS[0]}", "--fork-strategy=fewest", "--generate-hashes"]
    fixed += ["--no-build", f"--exclude-newer={MIN_AGE}", "--no-config", "--quiet"]
    fixed += ["--no-header", "--annotation-style=line"]
    file = FOLDER / f"{name}.txt"
    command = [sys.executable, "-m", "uv", "pip", "compile", *fixed, *arguments, "--output-file", str(file)]
    subprocess.run(command, cwd=ROOT, input="\n".join(input), text=True, check=True, stdout=subprocess.DEVNULL)
    _write(name, without_unlocked(file.read_text(encoding="utf-8")))


def without_unlocked(text: str) -> str:
    """Return a lock without the distributions that are not locked."""
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return "".join(entry for entry in entries if not UNLOCKED.fullmatch(entry.partition("==")[0]))


def _write(name: str, text: str) -> None:
    (FOLDER / f"{name}.txt").write_text(HEADER + text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
