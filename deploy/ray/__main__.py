"""`python -m deploy.ray` serves a fleet until a signal; `python -m deploy.ray update` changes one that runs.

Both take the flags of a fleet and those of `flamboyance serve`. An update replaces the replicas one by one if the version,
the `--generation` or a setting that all models share has changed, and the gateways if any setting has. Other changes
restart nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve

from deploy.ray.app import NAME, ROOT, application, http_options
from deploy.ray.drain import drain
from deploy.ray.fleet import Fleet, read_fleet
from model.zoo.fetch import DefaultModelError
from server.address import check_address
from server.serving import open_database
from server.settings import Settings, SettingsError
from server.signals import ending_signals
from server.store.database import Database
from server.telemetry import logs
from server.wire import ENGINE_FACTORY

logger = logging.getLogger("deploy.ray")

UPDATE, ADDRESS = "update", "--address"


def main(arguments: Sequence[str], factory: str = ENGINE_FACTORY) -> int:
    """Run the command, and return its exit status."""
    try:
        is_update, address, rest = _command(arguments)
        fleet = read_fleet(rest)
        if not is_update:
            check_address(fleet.settings.host, fleet.settings.port)
            asyncio.run(check_database(fleet.settings))
    except (SettingsError, DefaultModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logs.configure(fleet.settings.log_level, fleet.settings.log_format)
    connect(address or ("auto" if is_update else None))
    if is_update:
        deploy(fleet, factory)
        _log_ready(fleet)
    else:
        serve_until_signal(fleet, factory)
    ray.shutdown()
    return 0


def serve_until_signal(fleet: Fleet, factory: str) -> None:
    """Deploy a fleet, and end it after a signal, which may arrive before it serves. A second one ends its requests."""
    has_ended, hurry, is_serving = threading.Event(), threading.Event(), False

    def end(*_: object) -> None:
        if has_ended.is_set():
            hurry.set()  # a second signal must not cancel the end
            return
        has_ended.set()
        raise _Ended

    for number in ending_signals():
        signal.signal(number, end)
    try:
        serve.start(http_options=http_options(fleet))
        deploy(fleet, factory)
        is_serving = True
        _log_ready(fleet)
        has_ended.wait()
    except _Ended:
        logger.info("the fleet ends")
        if is_serving:
            drain(fleet.settings.shutdown_timeout, hurry)
    finally:
        serve.shutdown()


class _Ended(BaseException):
    """A signal to end has arrived."""


def _log_ready(fleet: Fleet) -> None:
    url = f"http://{fleet.settings.host}:{fleet.settings.port}"
    logger.info("the fleet is ready", extra={"url": url, "address": ray.get_runtime_context().gcs_address})


async def check_database(settings: Settings) -> None:
    """Open the database once, before anything is started. Raises `SettingsError` if it cannot be used."""
    database = Database(settings.database_url, settings.database_setting)
    await open_database(database)
    database.close()


def connect(address: str | None) -> None:
    """Connect to a cluster of Ray, or start one on this machine."""
    local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, configure_logging=False, **local)


def deploy(fleet: Fleet, factory: str = ENGINE_FACTORY) -> None:
    """Deploy a fleet, and return when it serves."""
    serve.run(application(fleet, factory), name=NAME, route_prefix="/")


def _command(arguments: Sequence[str]) -> tuple[bool, str | None, list[str]]:
    """Return whether a fleet is to be updated, the address of Ray, and the other arguments."""
    rest = list(arguments)
    is_update = rest[:1] == [UPDATE]
    if is_update:
        rest.pop(0)
    if ADDRESS not in rest:
        return is_update, None, rest
    index = rest.index(ADDRESS)
    if index + 1 == len(rest):
        raise SettingsError(f"{ADDRESS}: the address of a cluster is missing")
    return is_update, rest[index + 1], rest[:index] + rest[index + 2 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
