"""A locked distribution is installable where a wheel with a locked digest fits the Python and the machine."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.requirements import Requirement

from deploy.supply import wheels
from deploy.supply.lock import Locked
from deploy.supply.wheels import is_installable

FILES = [
    ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "0"),
    ("a-1-cp310-abi3-manylinux2014_aarch64.manylinux_2_17_aarch64.whl", "1"),
    ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", "not locked"),
    ("a-1-cp313-cp313-musllinux_1_2_x86_64.whl", "2"),
    ("a-1.tar.gz", "3"),
]
PROJECT = {"name": "a", "files": [{"filename": name, "hashes": {"sha256": digest}} for name, digest in FILES]}
DIGESTS = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("python", "machine", "is_there"),
    [
        ("3.11", "x86_64", True),
        ("3.12", "x86_64", False),
        ("3.13", "x86_64", False),
        ("3.13", "aarch64", True),
    ],
    ids=["a wheel", "a wheel that is not locked", "musl", "the stable ABI"],
)
def test_a_wheel_must_fit_and_be_locked(python: str, machine: str, is_there: bool) -> None:
    assert is_installable(Locked(Requirement("a==1"), DIGESTS), PROJECT, python, machine) is is_there


def test_a_distribution_for_other_platforms_needs_no_wheel() -> None:
    windows = Locked(Requirement("a==1; sys_platform == 'win32'"), DIGESTS)
    assert is_installable(windows, PROJECT, "3.12", "x86_64")


def test_the_versions_of_python_of_a_wheel_count() -> None:
    file = {"filename": "a-1-py3-none-any.whl", "hashes": {"sha256": "0"}, "requires-python": ">=3.12"}
    entry, project = Locked(Requirement("a==1"), DIGESTS), {"name": "a", "files": [file]}
    assert [is_installable(entry, project, python, "x86_64") for python in ("3.11", "3.12")] == [False, True]


def test_missing_wheels_are_named_and_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    projects: list[dict[str, Any]] = [PROJECT]
    monkeypatch.setattr(wheels, "read_lock", lambda _: [Locked(Requirement("a==1"), DIGESTS)])
    monkeypatch.setattr(wheels, "read_projects", lambda _: projects)
    assert wheels.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert {"Python 3.11, x86_64: all wheels exist", "Python 3.12, x86_64: a"} <= set(lines)
    monkeypatch.setattr(wheels, "PYTHONS", ("3.11",))
    assert wheels.main() == 0
