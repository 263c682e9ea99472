"""The configuration of a fleet: the number of replicas, the routing of requests, and the models that they serve.

The settings of the servers are those of `flamboyance serve`, and are the same for every replica. A file can list several
models, each with its own settings.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from deploy.ray.call import Routing
from model.config import fingerprint
from server.served_model import ServedModel
from server.settings import Settings, SettingsError, read_settings
from server.settings_file import read_yaml
from server.start import with_model
from server.version import VERSION

PROGRAM = "python -m deploy.ray"
# settings that a model in the file may not have: they concern the address, or data that all models share
SHARED = frozenset(
    {
        "allowed_hosts",
        "api_key",
        "config",
        "cors_origins",
        "data_dir",
        "database",
        "guard_metrics",
        "host",
        "log_format",
        "log_level",
        "media_store",
        "playground",
        "port",
        "require_key",
    }
)
# settings that the gateways apply before they know the model
OF_GATEWAYS = frozenset(
    {
        "body_timeout",
        "max_bodies_mb",
        "max_body_mb",
        "max_client_share",
        "max_connections",
        "max_import_mb",
        "max_num_queued",
        "request_timeout",
        "share_caches",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A fleet. `settings` are those of all servers; `models` the settings of each by name, the default one first."""

    settings: Settings
    models: Mapping[str, Settings]
    min_replicas: int
    max_replicas: int
    target_requests: int
    max_requests: int
    models_per_replica: int
    gateways: int
    routing: Routing
    cpus: float
    gpus: float
    version: str

    @property
    def is_scaled(self) -> bool:
        return self.min_replicas != self.max_replicas

    @property
    def replica_config(self) -> dict[str, Any]:
        """The part that running replicas apply without a restart."""
        return {"models": {name: model_config(settings) for name, settings in self.models.items()}}

    @property
    def gateway_config(self) -> dict[str, Any]:
        """The part that running gateways apply without a restart."""
        max_waiting = self.max_replicas * self.settings.max_num_queued
        return {"models": list(self.models), "routing": self.routing, "max_waiting": max_waiting}

    @property
    def gateway_version(self) -> str:
        """A digest like `version`, but of all settings: gateways read them at startup only, and hold no state."""
        return _digest(self.version, self.settings.model_dump_json())


def model_config(settings: Settings) -> dict[str, Any]:
    """Return the configuration of one model as JSON; it also changes if the weights in the model's folder are replaced."""
    assert settings.model is not None
    values = settings.model_dump(mode="json", exclude=set(SHARED))
    return {"settings": values, "weights": fingerprint(Path(settings.model))}


def read_fleet(arguments: Sequence[str]) -> Fleet:
    """Read the flags of a fleet, and those of `flamboyance serve`, and prepare the models. Raises `SettingsError`."""
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())  # before that of the servers' settings, which ends the program
    options, rest = parser.parse_known_args(arguments)
    settings = read_settings(rest, PROGRAM)
    _check_shared(settings)
    low, dash, high = options.replicas.partition("-")
    try:
        min_replicas, max_replicas = int(low), int(high if dash else low)
    except ValueError:
        raise SettingsError(f"--replicas: {options.replicas!r} is neither a number nor a range such as 2-8") from None
    if not 1 <= min_replicas <= max_replicas:
        raise SettingsError(f"--replicas: {options.replicas!r}: at least one, and the smaller number first")
    return Fleet(
        settings=settings,
        models=_models(settings, options.models),
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        target_requests=options.target_requests,
        max_requests=options.max_requests,
        models_per_replica=options.models_per_replica,
        gateways=options.gateways,
        routing=options.routing,
        cpus=options.cpus,
        gpus=options.gpus,
        version=_version(settings, options.models_per_replica, options.generation),
    )


def _models(settings: Settings, file: Path | None) -> dict[str, Settings]:
    """Return the settings of each model: those in the file, or else those of the only model."""
    if file is None:
        prepared = with_model(settings)
        name = ServedModel.load(prepared).name
        return {name: prepared.model_copy(update={"served_model_name": name})}
    try:
        entries = read_yaml(file)
    except ValueError as error:
        raise SettingsError(f"--models: {file}: {error}") from None
    if not isinstance(entries, dict) or not entries:
        raise SettingsError(f"--models: {file} is not a mapping of names to settings")
    return {str(name): _model(str(name), {} if entry is None else entry, settings) for name, entry in entries.items()}


def _model(name: str, entry: Any, settings: Settings) -> Settings:
    if not isinstance(entry, dict):
        raise SettingsError(f"--models: {name}: {entry!r} is not a mapping of settings")
    if shared := sorted(SHARED & entry.keys()):
        raise SettingsError(f"--models: {name}: {', '.join(shared)} cannot differ between models")
    if applied := sorted(OF_GATEWAYS & entry.keys()):
        hint = "the gateways apply it to all models; give it as a flag of the fleet"
        raise SettingsError(f"--models: {name}: {', '.join(applied)} cannot differ between models: {hint}")
    values = {field: getattr(settings, field) for field in settings.model_fields_set}
    try:
        merged = Settings.model_validate({**values, "model": None, **entry, "served_model_name": name})
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"--models: {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    prepared = with_model(merged)
    ServedModel.load(prepared)  # a folder that is not a model is refused here, and not by every replica
    return prepared


def _check_shared(settings: Settings) -> None:
    """Refuse a database that only one server can use. Raises `SettingsError`."""
    try:
        is_shared = settings.database is not None and make_url(settings.database_url).drivername.startswith(
            "postgresql"
        )
    except (ArgumentError, ValueError):
        is_shared = False
    if not is_shared:
        raise SettingsError(
            "database: the replicas of a fleet need one PostgreSQL: postgresql://USER:PASSWORD@HOST/NAME"
        )


def _version(settings: Settings, models_per_replica: int, generation: str) -> str:
    """Return a digest; if it changes, running replicas are outdated and are replaced one by one."""
    shared = settings.model_dump_json(include=set(SHARED) - {"api_key", "database"})
    secrets = [secret.get_secret_value() for secret in (settings.api_key, settings.database) if secret is not None]
    return _digest(VERSION, shared, secrets, models_per_replica, generation)


def _digest(*values: object) -> str:
    return hashlib.sha256(" ".join(map(str, values)).encode()).hexdigest()[:16]


def _count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _amount(text: str) -> float:
    """Read a finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number


def address_parser() -> argparse.ArgumentParser:
    """Return the parser of the one flag that is not part of a fleet: where its Ray is."""
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False, add_help=False)
    help = "address of a Ray cluster (default: a new Ray; for update, the one of this machine)"
    parser.add_argument("--address", metavar="HOST:PORT", help=help)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        parents=[address_parser()],
        usage="%(prog)s [update] [--replicas N] [--models FILE] [...] [the flags of flamboyance serve]",
        description="Serve models with replicas at one address, on Ray; with update, change a fleet that runs.",
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--replicas", default="2", help="number of servers, or a range to scale in, such as 2-8 (default: 2)")
    add("--target-requests", type=_count, default=8, help="target of requests per replica for scaling (default: 8)")
    add("--max-requests", type=_count, default=64, help="maximum requests of one replica (default: 64)")
    add(
        "--models",
        type=Path,
        help="YAML file of several models: names, each with its settings; the first is the default",
    )
    add("--models-per-replica", type=_count, default=2, help="maximum models in one replica (default: 2)")
    add("--gateways", type=_count, default=2, help="number of processes that pass requests on (default: 2)")
    add("--routing", choices=get_args(Routing), default="affinity", help="how replicas are chosen (default: affinity)")
    add("--cpus", type=_amount, default=0, help="processors that Ray reserves for a replica (default: 0)")
    add("--gpus", type=_amount, default=0, help="GPUs that Ray reserves for a replica (default: 0)")
    add("--generation", default="", help="any text: when it changes, an update replaces all replicas one by one")
    return parser
