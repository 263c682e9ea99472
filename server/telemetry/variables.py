"""Checks OpenTelemetry's own variables before its packages read them.

For a wrong value they would log a traceback, use another value, or log a header of the collector, which may be a key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.metadata import entry_points

# variables with names of plugins, and the groups of the plugins; the first one is read when FastAPI is imported
CONTEXT = {"OTEL_PYTHON_CONTEXT": "opentelemetry_context"}
PLUGINS = {
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "opentelemetry_resource_detector",
    "OTEL_PYTHON_METER_PROVIDER": "opentelemetry_meter_provider",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "opentelemetry_otlp_credential_provider",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER": "opentelemetry_otlp_credential_provider",
}
# the limits of spans and attributes are not here: the SDK refuses a wrong one, and names it
WHOLE_NUMBERS = (
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
)
TIMEOUTS = ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
# as the SDK reads it: a token, and printable ASCII without the characters ",;\
HEADER = re.compile(r"[!#-'*+.0-9A-Z^-z|~-]+[ \t]*=[ \t]*[ !#-+\--:<-\[\]-~]*")
RATIO, RATIO_SAMPLERS = "OTEL_TRACES_SAMPLER_ARG", ("traceidratio", "parentbased_traceidratio")
CHOICES = {
    "OTEL_EXPORTER_OTLP_COMPRESSION": ("none", "gzip", "deflate"),
    "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": ("none", "gzip", "deflate"),
}


def check_context(environment: Mapping[str, str]) -> None:
    """Raise `ValueError` for a context that is not installed."""
    _check_plugins(environment, CONTEXT)


def check_variables(environment: Mapping[str, str]) -> None:
    """Raise `ValueError` for a variable that the SDK could not use. Its text has no header."""
    _check_plugins(environment, PLUGINS)
    for name in WHOLE_NUMBERS:
        number = environment.get(name, "").strip()
        if number and not number.isdecimal():
            raise ValueError(f"{name} must be a whole number, and is {number!r}")
    for name in TIMEOUTS:
        if (value := environment.get(name)) and not 0 < _number(value) < math.inf:
            raise ValueError(f"{name} must be a number of seconds above 0, and is {value!r}")
    for name, choices in CHOICES.items():
        if (value := environment.get(name, "").strip()) and value.lower() not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, and is {value!r}")
    has_ratio = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower() in RATIO_SAMPLERS
    if has_ratio and (value := environment.get(RATIO)) and not 0 <= _number(value) <= 1:
        raise ValueError(f"{RATIO} must be a number from 0 to 1, and is {value!r}")
    for name in HEADERS:
        if not all(HEADER.fullmatch(part.strip()) for part in environment.get(name, "").split(",") if part.strip()):
            raise ValueError(f"{name} must be NAME=VALUE,NAME=VALUE, with special characters of a value as %XX")


def _check_plugins(environment: Mapping[str, str], groups: Mapping[str, str]) -> None:
    for variable, group in groups.items():
        for name in filter(None, map(str.strip, environment.get(variable, "").split(","))):
            if name != "*" and not entry_points(group=group, name=name):
                raise ValueError(f"{variable} names {name!r}, which is not installed")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
