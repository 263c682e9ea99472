"""Traces of a real server process, as a collector gets them."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flamboyance_client import Client
from server.settings import child_environment
from server.telemetry.tracing import trace_requests
from tests.server.collector import Collector, attributes, collecting
from tests.server.conftest import data_url, image_part, png
from tests.server.test_main import ROOT, Server, running
from tests.tiny_models import CONFIGS

CONFIG = CONFIGS["openflamingo"]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GENERATION = ["receive", "prepare", "queue", "prefill", "decode", "answer"]
# of two clocks on one machine, while the system adjusts one of them
CLOCK_SECONDS = 0.02


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(model_folder: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        log = tmp_path_factory.mktemp("log") / "log"
        with running(model_folder, log, "-m", "server", "--otlp-endpoint", collector.url) as server:
            yield server


def test_the_applications_of_a_process_share_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica of a fleet loads and unloads models as long as it runs."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    trace_requests(FastAPI(), "http://127.0.0.1:9", "first")
    before = threading.active_count()
    for _ in range(3):
        trace_requests(FastAPI(), "http://127.0.0.1:9", "second")
    assert threading.active_count() == before


def traceparent(trace_id: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{CALLER}-{flags}"}


def trace_of(number: int) -> str:
    return f"{TRACE[:-2]}{number:02x}"


def root_of(spans: list[Span]) -> Span:
    (root,) = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    return root


def children(spans: list[Span], parent: Span) -> list[Span]:
    """Return the children of a span in the order of their times."""
    unsorted = [span for span in spans if span.parent_span_id == parent.span_id]
    return sorted(unsorted, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_completion_is_a_tree_of_its_stages(server: Server, collector: Collector) -> None:
    prompt = [image_part(png("red", (30, 20))), {"type": "text", "text": "Output:"}]
    body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    headers = {**traceparent(TRACE), "X-Request-Id": "mine"}
    before = {name: server.metric(f"request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")}
    began = time.time()
    response = server.http.post("/v1/completions", json=body, headers=headers)
    ended = time.time()
    assert response.is_success
    spans = collector.trace(TRACE)
    root = root_of(spans)
    assert (root.name, root.parent_span_id.hex()) == ("POST /v1/completions", CALLER)
    assert response.headers["traceresponse"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    stages = children(spans, root)
    assert [stage.name for stage in stages] == GENERATION
    details = {stage.name: [span.name for span in children(spans, stage)] for stage in stages}
    assert {name: names for name, names in details.items() if names} == {
        "queue": ["media.decode"],
        "prefill": ["media.encode"],
    }
    assert len(spans) == 1 + len(stages) + 2
    # one stage begins when the one before it ends, so their times add up exactly
    edges = [root.start_time_unix_nano, *(stage.end_time_unix_nano for stage in stages)]
    assert [stage.start_time_unix_nano for stage in stages] == edges[:-1]
    assert edges[-1] == root.end_time_unix_nano
    for parent in (root, *stages):
        for child in children(spans, parent):
            assert parent.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
            assert child.end_time_unix_nano <= parent.end_time_unix_nano
    assert began - CLOCK_SECONDS <= root.start_time_unix_nano / 1e9
    assert root.end_time_unix_nano / 1e9 <= ended + CLOCK_SECONDS
    by_name = {stage.name: seconds(stage) for stage in stages}
    measured = {name: server.metric(f"request_{name}_time_seconds_sum") - sum for name, sum in before.items()}
    assert by_name["prefill"] == pytest.approx(measured["prefill"], abs=1e-5)
    assert by_name["decode"] == pytest.approx(measured["decode"], abs=1e-5)
    # the metric begins when the request is routed, the span a moment earlier
    assert 0 < by_name["receive"] + by_name["prepare"] + by_name["queue"] - measured["queue"] < CLOCK_SECONDS
    usage = response.json()["usage"]
    assert attributes(root.attributes) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "flamboyance",
        "gen_ai.request.model": response.json()["model"],
        "gen_ai.response.model": response.json()["model"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": attributes(root.attributes)["gen_ai.response.time_to_first_chunk"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5,
        "flamboyance.request_id": "mine",
        "flamboyance.media": 1,
        "flamboyance.media_encoded": 1,
    }
    assert collector.resource["service.name"] == "flamboyance"
    assert collector.resource["deployment.environment.name"] == "test"
    (line,) = [line for line in lines(server) if line.get("request_id") == "mine"]
    assert (line["message"], line["trace_id"]) == ("request finished", TRACE)


def lines(server: Server) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_media_that_the_server_has_are_not_decoded_again(server: Server, collector: Collector) -> None:
    prompt = [image_part(png("blue", (30, 20))), {"type": "text", "text": "Output:"}]
    for number in (1, 2):
        headers = traceparent(trace_of(number))
        assert server.http.post("/v1/completions", json={"prompt": prompt}, headers=headers).is_success
    names = [{span.name for span in collector.trace(trace_of(number))} for number in (1, 2)]
    assert names[0] - names[1] == {"media.decode", "media.encode"}


def test_a_stream_ends_with_its_last_byte(server: Server, collector: Collector) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True, "stream": True}
    assert server.http.post("/v1/completions", json=body, headers=traceparent(trace_of(3))).is_success
    spans = collector.trace(trace_of(3))
    assert [stage.name for stage in children(spans, root_of(spans))] == GENERATION


@pytest.mark.parametrize(
    ("number", "path", "body"),
    [
        (4, "/v1/score", {"prompt": "abc", "candidates": ["d", "ef"]}),
        (5, "/v1/embeddings", {"input": ["abc"]}),
        (6, "/v1/embeddings", {"input": [image_part(png("green", (9, 9)))]}),
    ],
    ids=["score", "texts", "media"],
)
def test_a_request_without_tokens_computes(
    server: Server, collector: Collector, number: int, path: str, body: dict[str, object]
) -> None:
    assert server.http.post(path, json=body, headers=traceparent(trace_of(number))).is_success
    spans = collector.trace(trace_of(number))
    names = [stage.name for stage in children(spans, root_of(spans))]
    assert [name for name in names if name in {"prefill", "compute", "decode"}] == ["compute"]
    assert names[:2] + names[-1:] == ["receive", "prepare", "answer"]


def test_a_search_in_a_support_set_is_part_of_the_request(server: Server, collector: Collector) -> None:
    examples = [{"image": data_url(png(label, (20, 10))), "label": label} for label in ("red", "blue")]
    assert server.http.post("/v1/support_sets", json={"name": "colours", "examples": examples}).is_success
    selected = {"support_set": "colours", "k": 1, "strategy": "rices_image"}
    body = {"examples": selected, "query": {"image": examples[0]["image"]}, "max_tokens": 2}
    assert server.http.post("/v1/fewshot/completions", json=body, headers=traceparent(trace_of(7))).is_success
    spans = collector.trace(trace_of(7))
    (prepare,) = [span for span in spans if span.name == "prepare"]
    assert "retrieval" in {span.name for span in children(spans, prepare)}


def test_a_refusal_is_an_error_of_the_caller(server: Server, collector: Collector) -> None:
    response = server.http.post("/v1/completions", json={"prompt": "a", "n": 0}, headers=traceparent(trace_of(8)))
    assert response.status_code == 400
    (root,) = collector.trace(trace_of(8))
    values = attributes(root.attributes)
    assert (values["http.response.status_code"], values["error.type"]) == (400, response.json()["error"]["code"])
    assert root.status.code == Status.STATUS_CODE_UNSET  # by OpenTelemetry's conventions, for 4xx of a server
    (line,) = [line for line in lines(server) if line.get("trace_id") == trace_of(8)]
    assert line["message"] == "request refused"


def test_a_trace_that_the_caller_does_not_record_is_not_sent(server: Server, collector: Collector) -> None:
    for number, flags in ((9, "00"), (10, "01")):
        headers = traceparent(trace_of(number), flags)
        assert server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers).is_success
    collector.trace(trace_of(10))
    assert not [span for span in collector.spans if span.trace_id.hex() == trace_of(9)]


def test_the_python_client_is_the_parent(server: Server, collector: Collector) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = HTTPXClientInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        with Client(str(server.http.base_url)) as client:
            client.complete("abc", max_tokens=2)
    finally:
        instrumentor.uninstrument()
    (caller,) = [span for span in exporter.get_finished_spans() if span.name.startswith("POST")]
    root = root_of(collector.trace(f"{caller.context.trace_id:032x}"))
    assert root.parent_span_id == caller.context.span_id.to_bytes(8, "big")


def test_the_last_traces_are_sent_at_exit(
    model_folder: Path, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    command = ["-m", "tests.server.scripted_server", "--otlp-endpoint", collector.url]
    with running(model_folder, tmp_path / "log", *command) as server:
        server.http.post("/v1/completions", json={"prompt": "a"}, headers=traceparent(trace_of(11)))
        assert server.stop() == 0
    assert root_of(collector.trace(trace_of(11))).name == "POST /v1/completions"


def test_without_the_setting_no_process_imports_the_sdk(
    model_folder: Path, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI itself imports the API of OpenTelemetry, without which it does nothing."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # every process writes what it imports to the log
    for name, flags in (("off", []), ("on", ["--otlp-endpoint", collector.url])):
        with running(model_folder, tmp_path / name, "-m", "server", *flags) as server:
            response = server.http.post("/v1/completions", json={"prompt": "a"}, headers=traceparent(trace_of(12)))
            assert ("traceresponse" in response.headers) == (name == "on")
        imported = {line.rpartition("|")[2].strip() for line in (tmp_path / name).read_text().splitlines()}
        assert {"server.app", "server.engine.engine"} <= imported
        of_traces = {"opentelemetry.sdk", "opentelemetry.exporter", "requests"} & imported
        assert len(of_traces) == (3 if name == "on" else 0), of_traces


def test_the_setting_without_the_packages_names_the_extra(model_folder: Path, tmp_path: Path) -> None:
    without = "sys.modules['opentelemetry.sdk'] = None; from server.start import main; sys.exit(main(sys.argv[1:]))"
    flags = [
        "--model",
        str(model_folder),
        "--port",
        "0",
        "--data-dir",
        str(tmp_path),
        "--otlp-endpoint",
        "http://127.0.0.1:9",
    ]
    command = [sys.executable, "-c", f"import sys; {without}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: otlp_endpoint: opentelemetry.sdk" in done.stderr.splitlines()[-1]
    assert "is not installed: install the extra otel" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OTEL_PROPAGATORS", "tracecontext,unknown", "error: OTEL_PROPAGATORS: Propagator unknown not found"),
        (
            "OTEL_BSP_SCHEDULE_DELAY",
            "0",
            "error: otlp_endpoint: a variable of OpenTelemetry .*: schedule_delay_millis must",
        ),
        (
            "OTEL_BSP_SCHEDULE_DELAY",
            "5s",
            "error: otlp_endpoint: .*: OTEL_BSP_SCHEDULE_DELAY must be a whole number, and is '5s'",
        ),
        ("OTEL_PYTHON_CONTEXT", "foo", "error: OTEL_PYTHON_CONTEXT names 'foo', which is not installed"),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "secret",
            "error: otlp_endpoint: .*: OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE,NAME=VALUE, ",
        ),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "x", "error: otlp_endpoint: .*: OTEL_SPAN_EVENT_COUNT_LIMIT must be a non-"),
    ],
)
def test_a_variable_of_opentelemetry_that_cannot_work_ends_the_start_with_one_line(
    variable: str, value: str, message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    flags = ["--port", "0", "--data-dir", str(tmp_path), "--otlp-endpoint", "http://127.0.0.1:9"]
    command = [sys.executable, "-m", "server", str(model_folder), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.match(message, line), line


@pytest.mark.parametrize("is_listening", [False, True])
def test_a_collector_that_does_not_respond_delays_no_request(
    is_listening: bool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the end of the server, for which an orchestrator waits only some seconds: each span is sent for ten here."""
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1] if is_listening else 9}"
        with running(model_folder, tmp_path / "log", "-m", "server", "--otlp-endpoint", endpoint) as server:
            assert server.http.post("/v1/completions", json={"prompt": "a"}, headers=traceparent(TRACE)).is_success
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 10


def test_other_processes_do_not_get_the_key_of_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert "OTEL_EXPORTER_OTLP_HEADERS" not in child_environment()
    assert child_environment()["OTEL_SERVICE_NAME"] == "mine"
