"""Checks that each locked version has a wheel for each supported Python on Linux, x86_64 and aarch64: `make wheels`.

pip installs only wheels from the locks. So after an upgrade, a missing wheel would be detected only on a machine that needs
it. The status is 1 if one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from deploy.supply.index import read_projects
from deploy.supply.lock import PYTHONS, Locked, read_lock

MACHINES = ("x86_64", "aarch64")
# Debian 12 and later have at least this version of glibc, which new wheels are built for
GLIBC = (2, 36)
OLDEST_GLIBC = 5
FIXED = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "sys_platform": "linux",
}


def main() -> int:
    """Print, for each Python and machine, the locked distributions without a wheel."""
    locked = read_lock("all")
    projects = dict(zip(locked, read_projects(entry.name for entry in locked), strict=True))
    num_missing = 0
    for python in PYTHONS:
        for machine in MACHINES:
            missing = [e.name for e, project in projects.items() if not is_installable(e, project, python, machine)]
            num_missing += len(missing)
            print(f"Python {python}, {machine}: {', '.join(missing) or 'all wheels exist'}")
    return 1 if num_missing else 0


def is_installable(entry: Locked, project: Mapping[str, Any], python: str, machine: str) -> bool:
    """Return whether a locked distribution has a wheel for a Python on a machine, or is not needed there."""
    values = {**FIXED, "platform_machine": machine, "python_version": python, "python_full_version": f"{python}.0"}
    if entry.requirement.marker is not None and not entry.requirement.marker.evaluate(values):
        return True
    tags = tags_of(python, machine)
    return any(
        not tags.isdisjoint(parse_wheel_filename(file["filename"])[3])
        for file in project["files"]
        if file["hashes"]["sha256"] in entry.digests
        and file["filename"].endswith(".whl")
        and f"{python}.0" in SpecifierSet(file.get("requires-python") or "")
    )


def tags_of(python: str, machine: str) -> set[Tag]:
    """Return the tags of the wheels that a CPython can install on Linux."""
    major, minor = map(int, python.split("."))
    names = [f"manylinux_{GLIBC[0]}_{n}" for n in range(OLDEST_GLIBC, GLIBC[1] + 1)]
    platforms = [f"{name}_{machine}" for name in (*names, "manylinux1", "manylinux2010", "manylinux2014", "linux")]
    interpreter = f"cp{major}{minor}"
    return {
        *cpython_tags((major, minor), platforms=platforms),
        *compatible_tags((major, minor), interpreter, platforms),
    }


if __name__ == "__main__":
    raise SystemExit(main())
