"""The locks agree with the bounds in pyproject.toml and with each other, and make and the image install from them alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.supply import lock
from deploy.supply.lock import EXTRAS, FOLDER, PROJECT, PYTHONS, ROOT, UNLOCKED, Locked, read_lock, required
from model.zoo.default import LANGUAGE_MODEL_FILE, VISION_FILE

NAMES = [*EXTRAS, "model"]


def missing(requirement: Requirement, locked: list[Locked]) -> str:
    """Return what a lock lacks of a requirement, or an empty string."""
    name = canonicalize_name(requirement.name)
    versions = [entry.version for entry in locked if entry.name == name]
    outside = [version for version in versions if not requirement.specifier.contains(version, prereleases=True)]
    if UNLOCKED.fullmatch(name) or (versions and not outside):
        return ""
    return f"{requirement}: {', '.join(outside)} is locked" if outside else f"{requirement} is not locked"


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_has_every_requirement_within_its_bounds(name: str) -> None:
    locked = read_lock(name)
    assert [text for requirement in required(name) if (text := missing(requirement, locked))] == []


def test_a_missing_requirement_and_a_version_outside_its_bounds_are_found() -> None:
    locked = [Locked(Requirement("numpy==2.4.6"), ())]
    assert missing(Requirement("numpy>=2"), locked) == ""
    assert missing(Requirement("numpy>=3"), locked) == "numpy>=3: 2.4.6 is locked"
    assert missing(Requirement("Pillow>=1"), locked) == "Pillow>=1 is not locked"


def test_every_extra_but_one_is_locked() -> None:
    """The extra `bench` has llama.cpp, which is compiled."""
    extras = PROJECT["project"]["optional-dependencies"]
    locked = {str(requirement) for requirement in required("all")}
    named = {text for extra in extras.keys() - {"bench"} for text in extras[extra] if "flamboyance[" not in text}
    assert {str(Requirement(text)) for text in named} <= locked


def test_the_locks_agree() -> None:
    versions = {entry.name: entry.version for entry in read_lock("all")}
    assert len(versions) == len(read_lock("all"))
    for name in ("tests", "server"):
        assert {entry.name: entry.version for entry in read_lock(name)}.items() <= versions.items()


@pytest.mark.parametrize("name", NAMES)
def test_each_entry_is_one_version_with_digests(name: str) -> None:
    for entry in read_lock(name):
        assert [specifier.operator for specifier in entry.requirement.specifier] == ["=="]
        assert Version(entry.version).local is None  # such as +cpu: no index that is public has it
        assert entry.digests
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in entry.digests)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.txt")), ids=lambda file: file.stem)
def test_no_lock_names_an_index_or_a_path(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.search(r"://|^\s*-(?!-hash=sha256:)|file:|(?<!\w)/|@", line)] == []


def test_pytorch_is_not_locked_and_its_bounds_are_those_of_the_project() -> None:
    assert [entry.name for name in NAMES for entry in read_lock(name) if UNLOCKED.fullmatch(entry.name)] == []
    bounds = (FOLDER / "torch.txt").read_text(encoding="utf-8").splitlines()[1:]
    (torch,) = (text for text in PROJECT["project"]["dependencies"] if UNLOCKED.fullmatch(Requirement(text).name))
    assert bounds == [torch, "torchvision"]


def test_the_model_lock_has_the_distributions_of_the_default_model() -> None:
    assert [str(entry.requirement) for entry in read_lock("model")] == sorted(
        [VISION_FILE.requirement, LANGUAGE_MODEL_FILE.requirement]
    )


def test_the_locks_begin_with_the_lowest_python_of_the_project() -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert all(python in supported for python in PYTHONS)
    assert f"3.{int(PYTHONS[0].partition('.')[2]) - 1}" not in supported
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]} is required" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_make_installs_from_the_locks_alone() -> None:
    dry_run = ["make", "--dry-run", "--always-make", "test", "test-deploy"]
    done = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [line.partition("pip install ")[2].split() for line in done.stdout.splitlines() if "pip install" in line]
    assert len(set(map(tuple, installs))) == 6  # make that runs make prints some of them twice
    for options in installs:
        source = options[options.index("-r") + 1] if "-r" in options else ""
        if source == "deploy/locked/torch.txt":
            continue
        assert {"--no-deps", "--require-hashes" if source else "--no-build-isolation"} <= set(options)
        assert not source or source in {f"deploy/locked/{name}.txt" for name in EXTRAS}


def test_this_environment_has_what_its_distributions_require() -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


ENTRIES = """# the header
a==1 \\
    --hash=sha256:0
    # via torch
nvidia-b==3 ; sys_platform == 'linux' \\
    --hash=sha256:2
torch==2 \\
    --hash=sha256:1
torchmetrics==4
"""


def test_an_entry_is_left_out_with_its_digests() -> None:
    begin, end = ENTRIES.index("nvidia"), ENTRIES.index("torchmetrics")
    assert lock.without_unlocked(ENTRIES) == ENTRIES[:begin] + ENTRIES[end:]
