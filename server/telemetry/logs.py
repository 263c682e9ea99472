"""Writes one log line per event, as JSON or as text. Fields come from `extra`; they never hold prompts, media or keys.

The API process and the worker use the same format; the logger's name distinguishes them.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

# attributes of every LogRecord: all others come from `extra`
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<7} {name}: {message}", style="{", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_quoted(value)}" for name, value in _fields(record).items())
        return f"{super().formatMessage(record)}  {fields}".rstrip()


def _quoted(value: object) -> str:
    """Quote a text of several words or lines, so that one from a client, such as a path, cannot forge a field or a line."""
    text = str(value)
    return text if text.isprintable() and not set(" ='\"") & set(text) else repr(text)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}


# libraries of which only warnings are logged
TALKATIVE = ("alembic", "faiss.loader")


def configure(level: str, log_format: LogFormat) -> None:
    """Log to standard error; uvicorn's loggers propagate to the root logger too.

    Otherwise the loader of faiss would log an exception for each variant that the package lacks for this processor, and
    Alembic its plugins and each migration.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.root.level, logging.WARNING))
