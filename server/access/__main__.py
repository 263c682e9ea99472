"""`flamboyance keys create|list|revoke`: manages the API keys in a server's database, also while the server runs.

`python -m server.access` is the same. The first key must be created here: a server without keys is open, and anonymous
callers cannot create one.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.engine import make_url

from server.access.keys import Key, Keys, card, log_change
from server.access.quotas import LIMITS, MAX_LIMIT, MEASURES, Limits
from server.access.roles import ROLES
from server.access.tenants import DEFAULT_TENANT, TENANT_NAME
from server.errors import LastKey, ServerError
from server.schemas.base import IN_WORDS, KEY_NAME
from server.settings import SettingsError
from server.store.database import Database
from server.store.location import add_location, read_location
from server.store.schema import require_newest
from server.telemetry import logs

PROGRAM = "python -m server.access"
DESCRIPTION = (
    "Create, list and revoke the API keys in a server's database, also while the server runs. The first key is created "
    "here: a server without keys is open, and anonymous callers cannot create one."
)
# the author of changes in the log; for changes over HTTP it is the id of the administrator's key
NAME = "flamboyance keys"
ADMIN = "keys create NAME --role admin"


def main(arguments: Sequence[str], prog: str = PROGRAM) -> int:
    """Run a command, and return the exit status."""
    options = _parser(prog).parse_args(arguments)
    try:
        settings = read_location(options, prog)
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(_run(options, Database(settings.database_url, settings.database_setting)))
        print(f"in the database {make_url(settings.database_url).render_as_string()}", file=sys.stderr)
    except (SettingsError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


async def _run(options: Namespace, database: Database) -> None:
    try:
        try:
            database.require()
        except SettingsError:
            if options.command != "create":  # which may run before the first start of the server
                raise
            print("the database is new: a server with another one does not know this key", file=sys.stderr)
        else:
            # only the start of a server upgrades tables: the one that runs on them may be older
            await database.use_as_is(lambda session, now: require_newest(session.connection()), is_writing=False)
        await COMMANDS[options.command](options, Keys(database))
    finally:
        database.close()


async def _create(options: Namespace, keys: Keys) -> None:
    limits = Limits(**{name: getattr(options, name) for name in LIMITS})
    key, secret = await keys.create(options.name, options.role, limits, tenant=options.tenant or DEFAULT_TENANT)
    log_change("made", key, NAME)
    of_tenant = f" in the tenant {key.tenant}" if key.tenant else ""
    print(f"{key.id} has the role {key.role}{of_tenant}. Its secret is shown only now:", file=sys.stderr)
    print(secret)
    if len(await keys.all()) == 1:
        print("This is the first key: the server now refuses requests without a key.", file=sys.stderr)
        if key.role != "admin" or key.tenant:
            other = "another one of the default tenant" if key.tenant else "another one"
            print(f"To store data and to manage keys, create {other}: {ADMIN}", file=sys.stderr)


# width of the table if the output is not a terminal
PIPE_WIDTH = 200


async def _list(options: Namespace, keys: Keys) -> None:
    if options.json:
        print(json.dumps([card(key) for key in await keys.all()]))
        return
    # a part of an id could not be revoked
    table = Table(Column("id", no_wrap=True), "name", "tenant", "role", "created", "limits")
    for key in await keys.all():
        created = f"{datetime.fromtimestamp(key.created_at, UTC):%Y-%m-%d}"
        table.add_row(key.id, _shown(key.name), key.tenant, key.role, created, _limits(key))
    # a name is text: "[blue]" in it is no style
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, emoji=False).print(table)


async def _revoke(options: Namespace, keys: Keys) -> None:
    try:
        key = await keys.revoke(options.id, may_be_last=options.last)
    except LastKey as error:
        raise LastKey(f"{error.message}, or use --last") from None
    log_change("revoked", key, NAME)
    print(f"revoked {key.id} ({_shown(key.name)}); servers that run refuse it within five seconds")


def _shown(name: str) -> str:
    """Return a name as it is printed: a terminal would obey its control characters."""
    return name if name.isprintable() else ascii(name)


def _limits(key: Key) -> str:
    limits = msgspec.structs.asdict(key.limits)
    return "\n".join(
        f"{number} {name}/min" if name in MEASURES else f"{number} {name.replace('_', ' ')}"
        for name, number in limits.items()
        if number is not None
    )


COMMANDS = {"create": _create, "list": _list, "revoke": _revoke}


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="Create a key and print its secret.", allow_abbrev=False)
    create.add_argument("name", help="name of the key's owner", type=_name)
    create.add_argument("--role", choices=ROLES, default="inference", help="default: inference")
    create.add_argument(
        "--tenant",
        type=_tenant,
        help="tenant of the key; its keys share support sets, uploads and caches (default: the operator's own tenant)",
    )
    for measure in MEASURES:
        create.add_argument(f"--{measure}", type=_limit, metavar="N", help=f"{measure} per minute (default: no limit)")
    create.add_argument(
        "--support-sets", type=_limit, metavar="N", help="maximum support sets of the tenant (default: no limit)"
    )
    listing = commands.add_parser("list", help="List the keys, without their secrets.", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="print JSON, with the fields of GET /v1/keys")
    revoke = commands.add_parser("revoke", help="Revoke a key.", allow_abbrev=False)
    revoke.add_argument("id", help="the id of the key")
    revoke.add_argument(
        "--last",
        action="store_true",
        help="also revoke the last key: a running server then refuses all requests, and one that starts later is open",
    )
    for command in (create, listing, revoke):
        add_location(command)
    return parser


def _name(text: str) -> str:
    is_utf_8 = not re.search("[\ud800-\udfff]", text)  # Python decodes other bytes to surrogates
    if not 1 <= len(text) <= 128 or not is_utf_8 or re.fullmatch(KEY_NAME, text) is None:
        raise ArgumentTypeError(f"1 to 128 characters are accepted: {IN_WORDS[KEY_NAME]}")
    return text


def _tenant(text: str) -> str:
    if re.fullmatch(TENANT_NAME, text) is None:
        raise ArgumentTypeError("at most 48 lower-case letters, digits, - and _, the first a letter or digit")
    return text


def _limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LIMIT:
        raise ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_LIMIT}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
