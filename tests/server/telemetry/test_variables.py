"""OpenTelemetry's own variables are refused if its SDK could not use them."""

from __future__ import annotations

import pytest

from server.telemetry.variables import check_context, check_variables


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "must be a whole number, and is 'many'"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "5s", "must be a number of seconds above 0, and is '5s'"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "inf", "must be a number of seconds above 0, and is 'inf'"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "must be one of none, gzip, deflate, and is 'zstd'"),
        ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "process,foo", "names 'foo', which is not installed"),
        ("OTEL_PYTHON_METER_PROVIDER", "foo", "names 'foo', which is not installed"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "foo", "names 'foo', which is not installed"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_the_variable(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} {message}$"):
        check_variables({name: value})


def test_a_context_that_is_not_installed_is_refused() -> None:
    check_context({"OTEL_PYTHON_CONTEXT": "contextvars_context"})
    with pytest.raises(ValueError, match=r"^OTEL_PYTHON_CONTEXT names 'foo', which is not installed$"):
        check_context({"OTEL_PYTHON_CONTEXT": "foo"})


@pytest.mark.parametrize("value", ["secret", "a=1,secret", "a=secret;b=2", "a b=secret", 'a="secret"', "a=sécret"])
@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_a_wrong_header_is_refused_without_its_value(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be NAME=VALUE,NAME=VALUE") as refused:
        check_variables({name: value})
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("ratio", ["2", "-0.1", "nan", "half"])
def test_a_wrong_ratio_is_refused_if_the_sampler_has_one(ratio: str) -> None:
    check_variables({"OTEL_TRACES_SAMPLER_ARG": ratio, "OTEL_TRACES_SAMPLER": "always_on"})
    with pytest.raises(ValueError, match=f"^OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, and is '{ratio}'$"):
        check_variables({"OTEL_TRACES_SAMPLER_ARG": ratio, "OTEL_TRACES_SAMPLER": "parentbased_traceidratio"})


def test_the_sampler_may_be_one_of_another_package() -> None:
    check_variables({"OTEL_TRACES_SAMPLER": "xray"})


def test_what_the_sdk_can_use_is_accepted() -> None:
    check_variables(
        {
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BSP_EXPORT_TIMEOUT": "",
            "OTEL_PYTHON_METER_PROVIDER": "",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "GZIP",
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a=b%20c, Authorization = Basic abc==,",
            "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "process, *",
            "OTEL_TRACES_SAMPLER": "TraceIdRatio",
            "OTEL_TRACES_SAMPLER_ARG": "0.25",
            "OTEL_SPAN_EVENT_COUNT_LIMIT": "unset",
        }
    )
