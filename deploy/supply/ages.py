"""Lists the direct dependencies by the age of their latest release, from pip's package index: `make ages`.

A dependency is listed below the table if its latest release is older than 18 months, if its project is marked as archived,
deprecated or quarantined, or if the locked version was withdrawn (yanked).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from packaging.utils import canonicalize_name

from deploy.supply.index import read_projects, version_of
from deploy.supply.lock import read_lock, required

MAX_MONTHS = 18
DAYS_PER_MONTH = 365.25 / 12


@dataclass(frozen=True, slots=True)
class Release:
    """The latest release of a distribution."""

    name: str
    version: str
    released: date
    remarks: tuple[str, ...]

    def months(self, today: date) -> float:
        return (today - self.released).days / DAYS_PER_MONTH


def latest_release(project: Mapping[str, Any], locked: str | None) -> Release:
    """Return the latest release in an index's answer about a project; `locked` is the version in the lock.

    Pre-releases count only for a project without any other release.
    """
    files = [(version, file) for file in project["files"] if (version := version_of(file["filename"]))]
    offered = [(version, file) for version, file in files if not file["yanked"]]
    final = [(version, file) for version, file in offered if not version.is_prerelease]
    version, file = max(final or offered, key=lambda pair: str(pair[1]["upload-time"]))
    status = project.get("project-status", {}).get("status", "active")
    remarks = [status] if status != "active" else []
    if any(str(version) == locked and file["yanked"] for version, file in files):
        remarks.append(f"{locked} was withdrawn")
    return Release(project["name"], str(version), datetime.fromisoformat(file["upload-time"]).date(), tuple(remarks))


def table(releases: Iterable[Release], today: date) -> str:
    """Return the table of releases, the oldest first, and the names of dependencies to check."""
    ordered = sorted(releases, key=lambda release: release.released)
    rows = [f"| {r.name} | {r.version} | {r.released} | {r.months(today):.0f} |" for r in ordered]
    old = [r for r in ordered if r.months(today) > MAX_MONTHS]
    noted = [f"{r.name}: {remark}" for r in ordered for remark in r.remarks]
    heading = ["| package | latest release | on | months ago |", "|---|---|---|---|"]
    names = ", ".join(r.name for r in old) or "none"
    return "\n".join([*heading, *rows, "", f"older than {MAX_MONTHS} months on {today}: {names}", *noted])


def main() -> int:
    locked = {entry.name: entry.version for entry in read_lock("all")}
    names = sorted({canonicalize_name(requirement.name) for requirement in required("all")})
    releases = [latest_release(project, locked.get(project["name"])) for project in read_projects(names)]
    print(table(releases, datetime.now(UTC).date()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
