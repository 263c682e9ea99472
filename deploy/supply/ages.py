"""Lists the direct dependencies by the age of their latest release, from the package index of pip: `make ages`.

A dependency is named below the table if its latest release is older than 18 months, if its project is marked as archived,
deprecated or quarantined, or if the locked version was withdrawn (yanked).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import httpx
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from deploy.supply.lock import read_lock, required
from server.settings import child_environment

MAX_MONTHS = 18
DAYS_PER_MONTH = 365.25 / 12
JSON = "application/vnd.pypi.simple.v1+json"
# concurrent requests to an index
NUM_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Release:
    """The latest release of a distribution."""

    name: str
    version: str
    released: date
    remarks: tuple[str, ...]

    def months(self, today: date) -> float:
        return (today - self.released).days / DAYS_PER_MONTH


def index_url() -> str:
    """Return the URL of the index that pip is configured for, which its help shows."""
    command = [sys.executable, "-m", "pip", "install", "--help"]
    text = subprocess.check_output(command, text=True, env=child_environment(COLUMNS="1000"))
    (url,) = re.findall(r"--index-url <url>.*?\(default (\S+)\)", text, flags=re.DOTALL)
    return str(url).rstrip("/")


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


def version_of(filename: str) -> Version | None:
    """Return the version in the name of a file; None if the name is of no standard form."""
    try:
        parse = parse_wheel_filename if filename.endswith(".whl") else parse_sdist_filename
        return parse(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None


def table(releases: Iterable[Release], today: date) -> str:
    """Return the table of releases, the oldest first, and the names to be looked at."""
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
    url = index_url()
    with httpx.Client(headers={"Accept": JSON}, timeout=60, follow_redirects=True) as http:

        def read(name: str) -> Release:
            answer = http.get(f"{url}/{name}/").raise_for_status()
            return latest_release(answer.json(), locked.get(name))

        with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
            releases = list(threads.map(read, names))
    print(table(releases, datetime.now(UTC).date()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
