"""An audit reports advisories, distributions without an answer, and that no database has answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.supply import audit
from deploy.supply.audit import ADVISORIES, CLEAN, NOTHING_KNOWN, UNKNOWN, report
from deploy.supply.lock import read_lock

SOUND: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
ADVISORY = {"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"], "aliases": [], "description": ""}
UNSOUND = {"name": "b", "version": "2", "vulns": [ADVISORY, {**ADVISORY, "id": "PYSEC-2", "fix_versions": []}]}
SKIPPED = {"name": "c", "skip_reason": "c (3) could not be audited"}


def answer(*entries: dict[str, Any]) -> str:
    return json.dumps({"dependencies": entries, "fixes": []})


@pytest.mark.parametrize(
    ("entries", "lines", "status"),
    [
        ([SOUND, SOUND], ["2 distributions audited, 0 advisories"], CLEAN),
        (
            [SOUND, UNSOUND],
            [
                "b 2: PYSEC-1, fixed in 2.1, 3.0",
                "b 2: PYSEC-2, fixed in no version",
                "2 distributions audited, 2 advisories",
            ],
            ADVISORIES,
        ),
        (
            [SOUND, SKIPPED],
            ["not audited: c (3) could not be audited", "1 distributions audited, 0 advisories"],
            UNKNOWN,
        ),
    ],
    ids=["clean", "advisories", "incomplete"],
)
def test_a_report(entries: list[dict[str, Any]], lines: list[str], status: int) -> None:
    assert report(answer(*entries), "") == ("\n".join(lines), status)


@pytest.mark.parametrize(
    ("output", "errors"),
    [("", "Traceback\nConnectionError: no such host\n"), (answer(SKIPPED, SKIPPED), ""), ("", ""), (answer(), "")],
    ids=["no connection", "all skipped", "silence", "nothing"],
)
def test_without_a_database_nothing_is_known(output: str, errors: str) -> None:
    text, status = report(output, errors)
    assert status == UNKNOWN
    assert text.startswith(NOTHING_KNOWN)
    assert text != NOTHING_KNOWN


def test_what_is_locked_is_audited_and_pytorch_too() -> None:
    names = [line.partition("==")[0] for line in audit.audited()]
    assert set(names) == {entry.name for lock in ("all", "model") for entry in read_lock(lock)} | {
        "torch",
        "torchvision",
    }
    assert not any("+" in line for line in audit.audited())


def test_a_host_that_does_not_answer_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--vulnerability-service", "osv", "--osv-url", "http://127.0.0.1:9/"]
    assert audit.main(options) == UNKNOWN
    assert capsys.readouterr().out.startswith(NOTHING_KNOWN)
