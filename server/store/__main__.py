"""`flamboyance backup FILE` and `flamboyance restore FILE`: all stored data as one file.

`python -m server.store` is the same. A backup is taken while the server runs. A restore needs an empty database, whose
server does not run.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from server.errors import ServerError
from server.media.store import MediaStore
from server.settings import Settings, SettingsError
from server.signals import raise_ending_signals
from server.store.backup import BackupError, Manifest, restore_backup, write_backup
from server.store.database import Database
from server.store.location import add_location, read_location
from server.telemetry import logs

PROGRAM = "python -m server.store"
DESCRIPTION = "Write all stored data of a server to a file, or restore them."


def main(arguments: Sequence[str], prog: str = PROGRAM) -> int:
    """Write or restore a backup, and return the exit status: 1 if media are missing, 2 for an error."""
    options = _parser(prog).parse_args(arguments)
    file: Path = options.file
    raise_ending_signals()  # an exception removes the partial file
    try:
        settings = read_location(options, prog)
        logs.configure(settings.log_level, settings.log_format)
        manifest = asyncio.run(COMMANDS[options.command](file, settings))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (SettingsError, ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_rows = sum(manifest.rows.values())
    print(f"{file}: {num_rows} rows and {manifest.num_media} media, tables of version {manifest.schema}")
    if manifest.missing:
        print(f"warning: {len(manifest.missing)} media are missing: {', '.join(manifest.missing)}", file=sys.stderr)
    return bool(manifest.missing)


async def _backup(file: Path, settings: Settings) -> Manifest:
    if not file.parent.is_dir():
        raise BackupError(f"there is no folder {file.parent}")
    database = Database(settings.database_url, settings.database_setting)
    try:
        database.require()
        return await write_backup(file, database, MediaStore(settings.media_store_url))
    finally:
        database.close()


async def _restore(file: Path, settings: Settings) -> Manifest:
    if not file.exists():
        raise BackupError(f"there is no file {file}")
    database = Database(settings.database_url, settings.database_setting)
    try:
        database.lock()
        return await restore_backup(file, database, MediaStore(settings.media_store_url))
    finally:
        database.close()


COMMANDS = {"backup": _backup, "restore": _restore}
HELP = {
    "backup": "Write all stored data to a file, also while the server runs.",
    "restore": "Restore a backup into an empty database of any kind, and into the media store.",
}


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command, help=HELP[command], description=HELP[command], allow_abbrev=False)
        subparser.add_argument("file", type=_file, help="tar file of the backup")
        add_location(subparser)
    return parser


def _file(text: str) -> Path:
    if text == "-":  # in other commands it means a standard stream
        raise ArgumentTypeError("a backup is a file, and not a standard stream: give its name")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
