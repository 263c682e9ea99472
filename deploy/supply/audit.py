"""Looks for published advisories about the locked packages and the installed PyTorch: `make audit`.

pip-audit asks a database of advisories: the package index's own, or with `ARGS="--vulnerability-service osv"` that of OSV.
The status is 0 if there is no advisory, 1 if there is one, and 2 if the answer is not known for all distributions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.version import Version

from deploy.supply.lock import read_lock

CLEAN, ADVISORIES, UNKNOWN = 0, 1, 2
NOTHING_KNOWN = "Nothing is known: no database of advisories has answered. "


def main(options: Sequence[str]) -> int:
    """Print the advisories; the options are those of pip-audit."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(audited()))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", f"--requirement={file.name}", "--no-deps", "--disable-pip"]
        command += ["--format=json", "--progress-spinner=off", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    text, status = report(done.stdout, done.stderr)
    print(text)
    return status


def audited() -> list[str]:
    """Return the locked versions, and those of PyTorch here."""
    locked = [f"{entry.name}=={entry.version}" for name in ("all", "model") for entry in read_lock(name)]
    return [*locked, *(f"{name}=={Version(metadata.version(name)).public}" for name in ("torch", "torchvision"))]


def report(answer: str, errors: str) -> tuple[str, int]:
    """Return the report from an output of pip-audit, and the status of this command."""
    if not answer.strip():
        return f"{NOTHING_KNOWN}{(errors.strip().splitlines() or ['pip-audit says nothing'])[-1]}", UNKNOWN
    entries: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    skipped = [entry for entry in entries if "skip_reason" in entry]
    if len(skipped) == len(entries):
        return f"{NOTHING_KNOWN}{skipped[0]['skip_reason'] if skipped else 'The lock is empty.'}", UNKNOWN
    advisories = [(entry, advisory) for entry in entries for advisory in entry.get("vulns", ())]
    lines = [_line(entry, advisory) for entry, advisory in advisories]
    lines += [f"not audited: {entry['skip_reason']}" for entry in skipped]
    lines += [f"{len(entries) - len(skipped)} distributions audited, {len(advisories)} advisories"]
    return "\n".join(lines), ADVISORIES if advisories else UNKNOWN if skipped else CLEAN


def _line(entry: Mapping[str, Any], advisory: Mapping[str, Any]) -> str:
    fixed = ", ".join(advisory["fix_versions"]) or "no version"
    return f"{entry['name']} {entry['version']}: {advisory['id']}, fixed in {fixed}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
