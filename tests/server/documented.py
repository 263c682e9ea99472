"""Checks real requests and responses against the OpenAPI document, as a hook of an httpx client."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from server.api.guard import DOCS_PATHS, is_playground, takes_any_query
from server.api.openapi import EVENTS
from server.api.responses import JSON
from server.app import CLIENT_CLOSED_REQUEST
from server.openapi import document

URI = "urn:document"


@cache
def _validator(pointer: str) -> Draft202012Validator:
    registry: Registry[Any] = Registry().with_resource(URI, DRAFT202012.create_resource(document()))
    return Draft202012Validator({"$ref": f"{URI}#{pointer}"}, registry=registry)


def _conform(value: Any, *steps: str) -> None:
    """Fail unless a value conforms to the schema at these steps into the document."""
    pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    problems = [f"{error.json_path}: {error.message}" for error in _validator(pointer).iter_errors(value)]
    assert not problems, f"{pointer}: {problems}"


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Return the paths of the document as patterns, those with the fewest parameters first."""
    paths = sorted(document()["paths"], key=lambda path: path.count("{"))
    return [(re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path) for path in paths]


def operation_steps(request: httpx.Request) -> tuple[str, ...] | None:
    """Return the steps to the operation of a request, None for a request that no route answers."""
    method, requested = "get" if request.method == "HEAD" else request.method.lower(), request.url.path.rstrip("/")
    for pattern, path in _patterns():
        if pattern.fullmatch(requested) and method in document()["paths"][path]:
            return ("paths", path, method)
    return None


def is_page(path: str) -> bool:
    return path in DOCS_PATHS or is_playground(path)


def check(response: httpx.Response) -> None:
    """Fail for a response that the document does not describe, or for a request that it describes wrongly."""
    steps = operation_steps(response.request)
    if response.status_code == CLIENT_CLOSED_REQUEST or is_page(response.request.url.path):
        return
    if steps is None:
        assert response.status_code in (401, 404, 405), f"{response.request.url} is not in the document"
        return
    operation = document()["paths"][steps[1]][steps[2]]
    if response.status_code < 300:
        _check_request(response.request, operation, steps)
    status = str(response.status_code)
    assert status in operation["responses"], f"{steps}: {status} is not documented: {response.text}"
    _check_response(response, operation["responses"][status], (*steps, "responses", status))


def _check_request(request: httpx.Request, operation: dict[str, Any], steps: tuple[str, ...]) -> None:
    """An accepted request has documented parameters, and a body that conforms to its schema."""
    parameters = {p["name"]: p["schema"] for p in operation["parameters"] if p["in"] == "query"}
    for name, text in request.url.params.multi_items():
        if name not in parameters and takes_any_query(request.url.path):
            continue
        value = int(text) if parameters[name]["type"] == "integer" else text
        assert Draft202012Validator(parameters[name]).is_valid(value), f"{steps}: {name}={text}"
    content = operation.get("requestBody", {}).get("content", {})
    sent = request.headers.get("content-type", JSON).partition(";")[0]
    media_type = _media_type(sent if len(content) > 1 else JSON, content)
    if media_type == JSON and request.content:
        _conform(json.loads(request.content), *steps, "requestBody", "content", JSON, "schema")


def _check_response(response: httpx.Response, documented: dict[str, Any], steps: tuple[str, ...]) -> None:
    assert {name.lower() for name in documented["headers"]} <= {*response.headers, "etag"}, steps
    if "content" not in documented or response.status_code == 304 or response.request.method == "HEAD":
        assert not response.content, steps
        return
    media_type = _media_type(response.headers["content-type"].partition(";")[0], documented["content"])
    schema = (*steps, "content", media_type, "schema")
    if media_type == EVENTS:
        *chunks, end = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        assert end == "[DONE]"
        for chunk in chunks:
            _conform(json.loads(chunk), *schema)
    elif media_type == JSON:
        body = json.loads(response.content, parse_constant=_refuse)
        _conform(body, *schema)
        if "error" in body and response.status_code >= 400:
            assert f"`{body['error']['code']}`" in documented["description"], f"{steps}: {body['error']}"


def _media_type(actual: str, content: dict[str, Any]) -> str:
    """Return the documented media type that an actual one falls under."""
    kind = f"{actual.partition('/')[0]}/*"
    assert actual in content or kind in content or not content, f"{actual} is not in {list(content)}"
    return actual if actual in content else kind


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


async def check_whole(response: httpx.Response) -> None:
    await response.aread()
    check(response)


def check_unless_streamed(response: httpx.Response) -> None:
    """Check a response as it comes from another process; a stream is left to its reader."""
    if EVENTS not in response.headers.get("content-type", ""):
        response.read()
        check(response)


# for a client of an application in the same process, whose responses arrive whole
CHECKED: dict[str, list[Any]] = {"response": [check_whole]}
