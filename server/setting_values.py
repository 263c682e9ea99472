"""The types of settings whose values need more than a type and bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, SecretStr

MIN_KEY_LENGTH = 8
# of a page, as browsers send it, or of an application that is no web page, or all
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+|null|\*", re.ASCII | re.IGNORECASE)
# a name or an IPv4 address, or an IPv6 address in brackets
NAME = r"[^\s/?#@*:\[\]]+|\[[0-9a-fA-F:.]+\]"
HOST = re.compile(NAME)
# without a query: a path is added to it
COLLECTOR = re.compile(rf"https?://([^\s/?#@]*@)?({NAME})(:(?P<port>\d{{1,5}}))?(/[^\s?#]*)?")
TRACES = "/v1/traces"
MAX_PORT = 65535
# they have a meaning in the URLs of the database and of the media store
URL_PARTS = ("?", "::")


def _not_empty(value: Any) -> Any:
    """Return the value of a path: an empty variable, which is often a mistake, would be the working directory."""
    if value == "":
        raise ValueError("must be a path, and is empty")
    return value


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()  # a shell does not expand `--data-dir=~/data`, and a file is read by none
    except RuntimeError:
        raise ValueError(f"{path.parts[0]} is the folder of no user") from None


def _expanded(model: str) -> str:
    return str(_absolute(Path(model))) if model.startswith("~") else model


def _of_data(path: Path) -> Path:
    for part in URL_PARTS:
        if part in str(path):
            raise ValueError(
                f"{path} contains {part!r}, which has another meaning in the URL of a database or of a store"
            )
    return path


def _sendable(key: SecretStr) -> SecretStr:
    """Return a key without surrounding white space, because files with secrets often end with a line break."""
    text = key.get_secret_value().strip()
    if len(text) < MIN_KEY_LENGTH or not (text.isascii() and text.isprintable()):
        raise ValueError(f"must have at least {MIN_KEY_LENGTH} characters, printable ones of ASCII")
    return SecretStr(text)


def parts(setting: str) -> list[str]:
    """Return the parts of a setting that is separated by commas."""
    return [part for each in setting.split(",") if (part := each.strip())]


def without_password(url: str) -> str:
    """Return a URL for a message, without its user and password."""
    return re.sub("^([^:/]+://)?.*@", r"\1", url, flags=re.DOTALL)


def _of_hosts(setting: str) -> str:
    if not (names := parts(setting)):
        raise ValueError("names no host, so every request would be refused")
    for name in names:
        if HOST.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not the name of a host, such as api.example.org, without scheme and port")
    return setting


def _of_origins(setting: str) -> str:
    for part in parts(setting):
        if ORIGIN.fullmatch(part) is None:
            raise ValueError(f"{part!r} is not an origin, such as https://app.example.org, or * for all pages")
    return setting


def _of_collector(url: str) -> str:
    match = COLLECTOR.fullmatch(url)
    if match is None or int(match["port"] or 0) > MAX_PORT:
        raise ValueError(f"{without_password(url)!r} is not a URL such as http://collector:4318")
    if url.rstrip("/").endswith(TRACES):
        raise ValueError(f"{without_password(url)!r} ends with {TRACES}, which the server adds")
    return url


# the processes that the server starts have another working directory
AbsolutePath: TypeAlias = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_absolute)]
Model: TypeAlias = Annotated[str, AfterValidator(_expanded)]
DataFolder: TypeAlias = Annotated[AbsolutePath, AfterValidator(_of_data)]
Key: TypeAlias = Annotated[SecretStr, AfterValidator(_sendable)]
Hosts: TypeAlias = Annotated[str, AfterValidator(_of_hosts)]
Origins: TypeAlias = Annotated[str, AfterValidator(_of_origins)]
Collector: TypeAlias = Annotated[str, AfterValidator(_of_collector)]
