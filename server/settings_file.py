"""Reads settings from a YAML file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from model.unique_keys import load_yaml
from server.spelling import advice

# what yaml raises for a value that its tag or its form does not permit, such as the date 2026-13-45
WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_yaml(file: Path) -> Any:
    """Return the value of a YAML file. Raises `ValueError` if it cannot be read."""
    try:
        return load_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('"<unicode string>", ', "").split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except WRONG_VALUES as error:
        raise ValueError(f"it has a value that cannot be read: {error}") from None


def read_file(file: str, known: Collection[str]) -> dict[str, Any]:
    """Return the settings in a file. Raises `ValueError` if it cannot be read, or if its keys are not the `known` ones."""
    try:
        path = Path(file).expanduser()
    except RuntimeError:
        raise ValueError(f"{Path(file).parts[0]} is the folder of no user") from None
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"it contains a {type(values).__name__}, not a mapping of settings")
    if "config" in values:
        raise ValueError("the key config is not permitted: a file cannot name another file")
    if unknown := sorted(set(map(str, values)).difference(known)):
        raise ValueError(f"unknown key {', '.join(unknown)}{advice(unknown[0], known)}")
    return values
