"""Flags of commands that use the data of a server: the settings that determine where the data are."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from server.settings import Settings, read_settings

SETTINGS = ("data_dir", "database", "media_store", "config")


def add_location(parser: ArgumentParser) -> None:
    for name in SETTINGS:
        parser.add_argument(_flag(name), help=f"setting of the server: {Settings.model_fields[name].description}")


def read_location(options: Namespace, prog: str) -> Settings:
    """Return the settings by the flags, the environment and the YAML file. Raises `SettingsError`."""
    values = {name: getattr(options, name) for name in SETTINGS}
    return read_settings([f"{_flag(name)}={value}" for name, value in values.items() if value is not None], prog)


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
