"""The ages of dependencies: pre-releases, withdrawn releases, and projects that are not maintained."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from deploy.supply.ages import Release, latest_release, table


def file(name: str, day: str, *, is_yanked: bool = False) -> dict[str, Any]:
    return {"filename": name, "upload-time": f"{day}T08:00:00.5Z", "yanked": is_yanked}


OLD = file("a-1.0.tar.gz", "2023-05-01")
NEW = file("a-1.1-py3-none-any.whl", "2024-05-01")
PREVIEW = file("a-2.0rc1-py3-none-any.whl", "2026-05-01")
WITHDRAWN = file("a-1.2-py3-none-any.whl", "2025-05-01", is_yanked=True)
UNNAMED = file("a.zip", "2026-06-01")


def project(*files: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"name": "a", "files": files, **values}


@pytest.mark.parametrize(
    ("files", "version", "day"),
    [
        ([NEW, OLD], "1.1", date(2024, 5, 1)),
        ([OLD, NEW, PREVIEW, WITHDRAWN, UNNAMED], "1.1", date(2024, 5, 1)),
        ([PREVIEW], "2.0rc1", date(2026, 5, 1)),
    ],
    ids=["newest", "others do not count", "pre-releases alone"],
)
def test_the_latest_release(files: list[dict[str, Any]], version: str, day: date) -> None:
    assert latest_release(project(*files), "1.1") == Release("a", version, day, ())


def test_a_withdrawn_version_and_an_archived_project_are_remarked() -> None:
    withdrawn = latest_release(project(NEW, WITHDRAWN), "1.2")
    assert withdrawn.remarks == ("1.2 was withdrawn",)
    archived = latest_release(project(NEW, **{"project-status": {"status": "archived"}}), "1.1")
    assert archived.remarks == ("archived",)
    assert latest_release(project(NEW, **{"project-status": {"status": "active"}}), None).remarks == ()


def test_the_table_has_the_oldest_first_and_names_the_old() -> None:
    releases = [Release("new", "2", date(2026, 5, 1), ("archived",)), Release("old", "1", date(2025, 5, 15), ())]
    assert table(releases, date(2026, 11, 27)).splitlines() == [
        "| package | latest release | on | months ago |",
        "|---|---|---|---|",
        "| old | 1 | 2025-05-15 | 18 |",
        "| new | 2 | 2026-05-01 | 7 |",
        "",
        "older than 18 months on 2026-11-27: old",
        "new: archived",
    ]
    assert "none" in table(releases[:1], date(2026, 11, 27))
