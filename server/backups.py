"""`flamboyance backup FILE` and `flamboyance restore FILE`: all that clients have stored, as one file.

`python -m server.backups` is the same. A backup is taken while the server runs. A restore needs an empty database, whose
server does not run.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from server import logs
from server.errors import ServerError
from server.media.store import MediaStore
from server.settings import Settings, SettingsError, read_settings
from server.store.backup import Manifest, restore_backup, write_backup
from server.store.database import Database

PROGRAM = "python -m server.backups"
# settings of the server that say where its data are
SETTINGS = ("data_dir", "database", "media_store", "config")


def main(arguments: Sequence[str], prog: str = PROGRAM) -> int:
    """Write or restore a backup, and return the exit status: 1 if media are missing, 2 for an error."""
    command, file, flags = _parse(arguments, prog)
    try:
        settings = read_settings(flags, prog)
        logs.configure(settings.log_level, settings.log_format)
        manifest = asyncio.run(COMMANDS[command](file, settings))
    except (SettingsError, ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_rows = sum(manifest.rows.values())
    print(f"{file}: {num_rows} rows and {manifest.num_media} media, tables of version {manifest.schema}")
    if manifest.missing:
        print(f"warning: {len(manifest.missing)} media are missing: {', '.join(manifest.missing)}", file=sys.stderr)
    return bool(manifest.missing)


async def _backup(file: Path, settings: Settings) -> Manifest:
    database = Database(settings.database_url, settings.database_setting)
    try:
        return await write_backup(file, database, MediaStore(settings.media_store_url))
    finally:
        database.close()


async def _restore(file: Path, settings: Settings) -> Manifest:
    database = Database(settings.database_url, settings.database_setting)
    try:
        database.lock()
        return await restore_backup(file, database, MediaStore(settings.media_store_url))
    finally:
        database.close()


COMMANDS = {"backup": _backup, "restore": _restore}
HELP = {
    "backup": "Write all that clients have stored to a file, also while the server runs.",
    "restore": "Restore a backup into an empty database, of any kind, and into the media store.",
}


def _parse(arguments: Sequence[str], prog: str) -> tuple[str, Path, list[str]]:
    """Return the command, the file, and the flags of the settings."""
    parser = ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command, help=HELP[command], description=HELP[command], allow_abbrev=False)
        subparser.add_argument("file", type=Path, help="a tar file")
        for name in SETTINGS:
            description = Settings.model_fields[name].description
            subparser.add_argument(_flag(name), help=f"setting of the server: {description}")
    options = vars(parser.parse_args(arguments))
    flags = [f"{_flag(name)}={options[name]}" for name in SETTINGS if options[name] is not None]
    return options["command"], options["file"], flags


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
