"""Schemathesis finds nothing in a few hundred cases of fixed seeds, and finds what it should in a server that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from bench.fuzz.api import LINKS, run_round, with_event_schemas, with_links
from bench.target import Target, get
from server.limits.deadline import HEADER

INTEGER = {"application/json": {"schema": {"type": "integer"}}}
TIMEOUT = {"name": HEADER, "in": "header", "required": True, "schema": {"enum": ["1"]}}
DOCUMENT = {
    "openapi": "3.1.0",
    "info": {"title": "wrong", "version": "1"},
    "paths": {
        "/broken": {"get": {"responses": {"200": {"description": "OK", "content": INTEGER}}}},
        "/text": {"get": {"responses": {"200": {"description": "OK", "content": INTEGER}}}},
        "/dead": {"get": {"responses": {"200": {"description": "OK"}, "503": {"description": "dead"}}}},
        "/late": {"get": {"responses": {"504": {"description": "late"}}}},
        "/late-as-stated": {"get": {"parameters": [TIMEOUT], "responses": {"504": {"description": "late"}}}},
    },
}
ANSWERS = {
    "/openapi.json": (200, DOCUMENT),
    "/broken": (500, {}),
    "/text": (200, "text"),
    "/dead": (503, {"error": {"code": "engine_died"}}),
    "/late": (504, {}),
    "/late-as-stated": (504, {}),
}


class _WrongServer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, value = ANSWERS.get(self.path, (404, {}))
        body = json.dumps(value, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def wrong_server() -> Iterator[Target]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _WrongServer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Target(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def test_cases_of_every_operation_and_chains_of_them_pass(target: Target) -> None:
    restarts = target.gauges()["engine_restarts_total"]
    result = run_round(target, 1, max_examples=3, phases="fuzzing,stateful")
    assert not result.failures, result.text
    assert result.num_cases > 100
    assert target.gauges()["engine_restarts_total"] == restarts


def test_the_borders_of_a_schema_pass(target: Target) -> None:
    result = run_round(target, 1, max_examples=5, phases="examples,coverage", include="^/v1/embeddings$")
    assert not result.failures, result.text
    assert result.num_cases > 50


def test_a_wrong_status_a_wrong_body_a_dead_worker_and_an_unstated_deadline_are_failures() -> None:
    with wrong_server() as target:
        failures = run_round(target, 0, max_examples=2, phases="fuzzing").failures
    names = " ".join(failures)
    assert "Server error: GET /broken" in names
    assert "GET /text" in names
    assert "the_worker_survives`: GET /dead" in names
    assert "only_a_stated_deadline_passes`: GET /late" in names
    assert "GET /late-as-stated" not in names


def test_an_event_is_described_as_json_in_a_string() -> None:
    chunk = {"anyOf": [{"type": "object"}]}
    content = {"text/event-stream": {"schema": chunk}}
    document = {"paths": {"/": {"post": {"responses": {"200": {"content": content}}}}}}
    schema = with_event_schemas(document)["paths"]["/"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    end, data = schema["schema"]["properties"]["data"]["anyOf"]
    assert end["const"] == "[DONE]"
    assert data["contentSchema"] == chunk


def test_links_lead_to_the_operations_that_take_what_a_response_names(target: Target) -> None:
    paths = with_links(target.send(get("/openapi.json")).json())["paths"]
    for method, path, status, _ in LINKS:
        assert paths[path][method]["responses"][status]["links"], path
    links = paths["/v1/evaluations"]["get"]["responses"]["200"]["links"]
    operation = paths["/v1/evaluations/{evaluation_id}"]["delete"]["operationId"]
    assert links[operation] == {"operationId": operation, "parameters": {"evaluation_id": "$response.body#/data/0/id"}}
