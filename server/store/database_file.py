"""The file of a SQLite database: its folder, its lock, and whether it is still the file that was opened.

Only one server may use a file: two servers would run each other's evaluations, and would not see each other's changes of
sets. The lock is one of the operating system, on a file next to the database, so a killed process releases it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

from server.errors import DatabaseUnavailable
from server.settings import SettingsError

DAMAGED = "the database is damaged"
# of a new folder and a new file: the database has texts of clients, which other users of the machine may not read
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
Identity = tuple[int, int]

logger = logging.getLogger(__name__)


class DatabaseFile:
    """The file of a SQLite database. Its path comes from the setting `setting`.

    Commits to an open file that was moved or deleted would be lost.
    """

    def __init__(self, path: Path, setting: str) -> None:
        self._path = path
        self._setting = setting
        self._lock = ExitStack()
        self._is_created = False
        # set if SQLite must open the file as immutable, because it cannot write next to it
        self.immutable_uri: str | None = None
        self._damaged: Identity | None = None

    def create_folder(self) -> None:
        """Create the folder of the file. Raises `SettingsError` if that is impossible."""
        folder = self._path.parent
        try:
            folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"{self._setting}: the folder {folder} of the database cannot be created: {error.strerror}; "
                f"set {self._setting} to a path where this user may write"
            ) from None

    def require(self) -> None:
        """Check that the file exists, and create none. Raises `SettingsError`.

        A file without a write-ahead log, in a folder where this user cannot write, can only be opened as immutable.
        """
        if not self._path.is_file():
            raise SettingsError(f"{self._setting}: the database {self._path} does not exist")
        path = self._path.resolve()  # SQLite's log is next to the file itself
        if not path.with_name(f"{path.name}-wal").exists() and not os.access(path.parent, os.W_OK):
            self.immutable_uri = f"{path.as_uri()}?immutable=1"

    def lock(self) -> None:
        """Lock the file against other servers until `unlock`, or until this process ends in any way.

        Raises `SettingsError` if another server has the lock, or if this user may not write next to the file.
        """
        self.create_folder()
        file = self._path.resolve()  # one lock for all names of the file
        path = file.with_name(f"{file.name}.lock")
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(path.open("a+b", buffering=0))  # whose errors do not wait for its end
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.truncate(0)
                lock.write(str(os.getpid()).encode())
            except BlockingIOError:
                remedy = f"stop it, or choose another --{self._setting.replace('_', '-')}"
                raise SettingsError(f"{self._setting}: {self._path} is in use by {_holder(lock)}; {remedy}") from None
            except OSError as error:
                raise SettingsError(f"{self._setting}: {path} cannot be locked: {error.strerror}") from None
            self._lock = stack.pop_all()

    def unlock(self) -> None:
        self._lock.close()

    def mark_damaged(self, identity: Identity | None) -> None:
        """Refuse every transaction until the file with this identity is replaced."""
        self._damaged = identity

    def require_undamaged(self, identity: Identity) -> None:
        """Raise `DatabaseUnavailable` for a damaged file.

        A connection with cached pages could still read, and would acknowledge writes that later connections do not find.
        """
        if identity == self._damaged:
            raise DatabaseUnavailable(DAMAGED)

    def identity(self) -> Identity:
        """Return the device and the inode of the file; the first call creates it. Raises `DatabaseUnavailable` if missing.

        Raises `SettingsError` if the file cannot be created.
        """
        if not self._is_created:
            self._create()
            self._is_created = True
        try:
            status = self._path.stat()
        except OSError:
            logger.error("the database file is missing", extra={"file": str(self._path)})
            raise DatabaseUnavailable("the database file is missing") from None
        return status.st_dev, status.st_ino

    def _create(self) -> None:
        """Create an empty file, which is an empty database, if there is none."""
        self.create_folder()
        try:
            # never an existing file: to close it would release SQLite's locks of this process
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
        except FileExistsError:
            pass
        except OSError as error:
            raise SettingsError(
                f"{self._setting}: the database {self._path} cannot be created: {error.strerror}"
            ) from None


def _holder(lock: FileIO) -> str:
    """Return the holder of a lock in words; it writes its process id into the file."""
    lock.seek(0)
    process_id = lock.read().decode()
    return f"another server (process {process_id})" if process_id else "another server"
