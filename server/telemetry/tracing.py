"""Traces with OpenTelemetry: a span per request, with one per stage in it, sent to a collector over HTTP.

Loaded only if the setting `otlp_endpoint` is set. Everything else is configured by OpenTelemetry's own environment
variables, which its SDK reads: the sampler, attributes of the resource, headers for the collector, the size of a batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.setting_values import TRACES
from server.telemetry.stages import NO_STAGES, Interval, Stages, current
from server.version import VERSION

SERVICE = "flamboyance"
# Time for the last spans at the end of the process. By default, a collector that hangs would delay it by half a minute,
# which is more than the grace period of an orchestrator leaves.
LAST_MILLISECONDS = 3000
# probes, scrapes and pages are not traced
TRACED = "/v1/"
# OpenTelemetry's names for the model operation of a route
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/fewshot/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
# attributes by the fields of a request's log line, with the names of OpenTelemetry's conventions if they exist
ATTRIBUTES = {
    "request_id": "flamboyance.request_id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "first_token_seconds": "gen_ai.response.time_to_first_chunk",
    "media": "flamboyance.media",
    "media_encoded": "flamboyance.media_encoded",
    "status": "http.response.status_code",
    "error": "error.type",
}


def trace_requests(app: FastAPI, endpoint: str, model_name: str) -> None:
    """Send traces of the requests of an application to the collector at `endpoint`."""
    app.add_middleware(Tracing, tracer=_tracer(endpoint), model_name=model_name)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_add_trace_id)


@cache
def _tracer(endpoint: str) -> Tracer:
    """Return the tracer of this process, whose thread the applications of its models share until the process ends."""
    resource = Resource({"service.name": SERVICE, "service.version": VERSION}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create().merge(resource))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES)
    provider.add_span_processor(_Batches(exporter))
    return provider.get_tracer(SERVICE, VERSION)


class _Batches(BatchSpanProcessor):
    """Sends spans in batches; at the end of the process it sends those that are left, but only for some seconds."""

    def shutdown(self) -> None:
        self._batch_processor.shutdown(LAST_MILLISECONDS)


# characters of a path in a span: spans wait in memory for the collector
MAX_PATH = 256


class Tracing:
    """Middleware before the guard that follows each request through its stages, in a child of the caller's span."""

    def __init__(self, app: ASGIApp, tracer: Tracer, model_name: str) -> None:
        self._app = app
        self._tracer = tracer
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(TRACED):
            await self._app(scope, receive, send)
            return
        stages, clock = Stages(), Clock()
        span = self._begin(scope, clock.epoch_ns(stages.began))

        async def send_with_trace(message: Message) -> None:
            if message["type"] == "http.response.start":
                stages.describe({"status": message["status"]})
                MutableHeaders(scope=message)["traceresponse"] = _header_of(span)
            await send(message)

        try:
            with _running(span, stages):
                await self._app(scope, receive, send_with_trace)
        finally:
            self._end(span, stages, clock, scope)

    def _begin(self, scope: Scope, start: int) -> Span:
        attributes = {
            "http.request.method": scope["method"][:16],
            "url.path": scope["path"][:MAX_PATH],
            "url.scheme": scope["scheme"],
        }
        # if the operator has instrumented the application, its span is already a child of the caller's
        is_begun = trace.get_current_span().get_span_context().is_valid
        caller = None if is_begun else propagate.extract(Headers(scope=scope))
        return self._tracer.start_span(scope["method"][:16], caller, SpanKind.SERVER, attributes, start_time=start)

    def _end(self, span: Span, stages: Stages, clock: Clock, scope: Scope) -> None:
        """End the span of a request, with what is known at its end, and add those of its stages."""
        intervals = stages.end()
        if span.is_recording():
            if route := getattr(scope.get("route"), "path", ""):
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            facts = {"request_id": scope["state"].get("request_id"), **stages.facts}
            span.set_attributes(self._attributes(facts, route))
            if stages.facts.get("status", 500) >= 500 or stages.facts.get("finish_reason") == "error":
                span.set_status(StatusCode.ERROR)
            self._add_children(span, intervals, stages.details, clock)
        span.end(clock.epoch_ns(stages.ended))

    def _attributes(self, facts: Mapping[str, Any], route: str) -> dict[str, AttributeValue]:
        attributes = {name: facts[fact] for fact, name in ATTRIBUTES.items() if facts.get(fact) is not None}
        if operation := OPERATIONS.get(route):
            attributes |= {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": SERVICE,
                "gen_ai.request.model": self._model_name,
                "gen_ai.response.model": self._model_name,
            }
        if "finish_reason" in facts:
            attributes["gen_ai.response.finish_reasons"] = [facts["finish_reason"]]
        return attributes

    def _add_children(self, span: Span, stages: list[Interval], details: list[Interval], clock: Clock) -> None:
        """Add the spans of stages and of details; a detail is a child of the stage that contains it completely, if any."""
        if len(stages) == 1:
            return  # a route without the engine's work has no stages
        spans = [self._add(stage, span, clock) for stage in stages]
        for detail in details:
            around = [each for stage, each in zip(stages, spans, strict=True) if stage.contains(detail)]
            self._add(detail, around[0] if around else span, clock)

    def _add(self, interval: Interval, parent: Span, clock: Clock) -> Span:
        context, start = trace.set_span_in_context(parent), clock.epoch_ns(interval.began)
        span = self._tracer.start_span(interval.name, context, attributes=interval.attributes, start_time=start)
        span.end(clock.epoch_ns(interval.ended))
        return span


class Clock:
    """Converts `time.monotonic()` to nanoseconds since the epoch, with one offset, so that durations do not change."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def epoch_ns(self, seconds: float) -> int:
        return int((seconds + self._offset) * 1e9)


@contextmanager
def _running(span: Span, stages: Stages) -> Iterator[None]:
    """Set a request's span and stages in the context. Records an error that no handler in the application caught."""
    token = current.set(stages if span.is_recording() else NO_STAGES)
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield
    except Exception as error:  # the response to it is sent outside of this middleware
        stages.describe({"error": type(error).__qualname__, "status": 500})
        raise
    finally:
        current.reset(token)


def _header_of(span: Span) -> str:
    """Return the header with the ids of the caller's trace and of the server's span (W3C Trace Context)."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _add_trace_id(record: logging.LogRecord) -> bool:
    """Add the id of the current trace to a log line."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        record.trace_id = f"{context.trace_id:032x}"
    return True
