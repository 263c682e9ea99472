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

from deploy.ray.app import GATEWAYS, NAME, ROOT, application, call_all, http_options
from deploy.ray.drain import drain
from deploy.ray.fleet import Fleet, address_parser, read_fleet
from model.zoo.fetch import DefaultModelError
from server.address import check_address
from server.serving import open_database
from server.settings import Settings, SettingsError
from server.signals import ending_signals
from server.store.database import Database
from server.telemetry import logs
from server.wire import ENGINE_FACTORY

logger = logging.getLogger("deploy.ray")

UPDATE = "update"


class FleetError(RuntimeError):
    """A fleet cannot be deployed; the message says why."""


def main(arguments: Sequence[str], factory: str = ENGINE_FACTORY) -> int:
    """Run the command, and return its exit status."""
    is_update = arguments[:1] == [UPDATE]
    rest = arguments[is_update:]
    options, _ = address_parser().parse_known_args(rest)
    try:
        fleet = read_fleet(rest)
        if not is_update:
            check_address(fleet.settings.host, fleet.settings.port)
        asyncio.run(check_database(fleet.settings))
        logs.configure(fleet.settings.log_level, fleet.settings.log_format)
        connect(options.address or ("auto" if is_update else None))
        if is_update:
            check_running(fleet)
            deploy(fleet, factory)
            _log_ready(fleet)
        else:
            serve_until_signal(fleet, factory)
    except (SettingsError, DefaultModelError, FleetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
    """Connect to a cluster of Ray, or start one on this machine. Raises `FleetError`."""
    local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, configure_logging=False, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise FleetError(f"--address: no Ray {where} can be used: {_first_line(error)}") from None


def check_running(fleet: Fleet) -> None:
    """Check that the fleet to update runs at the address of its settings. Raises `FleetError`."""
    if NAME not in serve.status().applications:
        raise FleetError("no fleet runs on this Ray: start one without `update`, or name its Ray with --address")
    # a gateway of another version may not know its address
    addresses = {tuple(address) for address in call_all(GATEWAYS, "http_address") if isinstance(address, list | tuple)}
    known = (fleet.settings.host, fleet.settings.port)
    if addresses and known not in addresses:
        (host, port), *_ = addresses
        raise FleetError(
            f"the fleet on this Ray is at {host}:{port}, and not at {known[0]}:{known[1]}: "
            "repeat its --host and --port, or name the Ray of another fleet with --address"
        )


def deploy(fleet: Fleet, factory: str = ENGINE_FACTORY) -> None:
    """Deploy a fleet, and return when it serves. Raises `FleetError`."""
    try:
        serve.run(application(fleet, factory), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise FleetError(f"{_first_line(error)} {_reason()}") from None


def _reason() -> str:
    """Return the last line of what Ray says of each deployment that does not run: the exception that ended it."""
    deployments = serve.status().applications[NAME].deployments.values()
    messages = [deployment.message.strip() for deployment in deployments if deployment.status != "HEALTHY"]
    return " ".join(message.splitlines()[-1] for message in messages if message)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
